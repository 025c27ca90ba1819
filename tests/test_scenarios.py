"""A scenario that fails on a launch's ranks fails the tests that read it, with its traceback, and no others."""

import pytest
import torch

from helpers.scenarios import Here, run_scenarios, scenario


@scenario
def where(here: Here):
    return {"rank": here.rank, "world": here.world, "tensor": torch.arange(here.rank + 1)}


@scenario(cases=[1, 2])
def works_with_one_case(here, number):
    assert number == 1, "two is too many"
    return number


@scenario(ranks=(1,))
def of_another_launch(here):
    return "ran"


@scenario
def fails_on_the_second_rank(here):
    if here.rank == 1:
        raise ValueError("only here")
    return "passed"


@scenario
def comes_too_late(here):
    return "ran"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_scenarios(__name__, tmp_path_factory.mktemp("scenarios"), ranks=2)


def complaint(rank, function, *case) -> str:
    with pytest.raises(pytest.fail.Exception) as failed:
        rank(function, *case)
    return str(failed.value)


def test_every_rank_returns_its_own(ranks):
    assert [(rank(where)["rank"], len(rank(where)["tensor"])) for rank in ranks] == [(0, 1), (1, 2)]
    assert [(rank.index, rank.world) for rank in ranks] == [(0, 2), (1, 2)]


def test_a_failure_on_all_ranks_is_told_and_the_others_run(ranks):
    for rank in ranks:
        assert rank(works_with_one_case, 1) == 1
        assert "AssertionError: two is too many" in complaint(rank, works_with_one_case, 2)


def test_a_failure_on_one_rank_ends_the_launch_and_is_told_to_whom_it_concerns(ranks):
    first, second = ranks
    assert first(fails_on_the_second_rank) == "passed"
    assert "fails_on_the_second_rank on rank 1:\nTraceback" in complaint(second, fails_on_the_second_rank)
    for rank in ranks:
        assert "ValueError: only here" in complaint(rank, comes_too_late)


def test_a_scenario_runs_only_with_the_ranks_it_asks_for(ranks):
    assert "has no result" in complaint(ranks[0], of_another_launch)
