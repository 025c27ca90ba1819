"""Ranks wait as long as the first one works, and a failure on one is a failure on all that is told once."""

import json

import pytest
from conftest import ROOT, launch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(ROOT / "tests" / "ranks_scenarios.py", folder, ranks=2)
    assert done.returncode == 0, done.stdout[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_work_of_the_first_rank_may_outlast_a_collective(results):
    assert [rank["slow"] for rank in results] == [["result", "made by 0"]] * 2


def test_every_rank_does_its_own(results):
    assert [rank["all"] for rank in results] == [["result", "done by 0"], ["result", "done by 1"]]


def test_a_failure_of_the_first_rank_is_one_of_all(results):
    assert [rank["first fails"] for rank in results] == [["ConfigError", "no such key", True]] * 2


def test_a_failure_elsewhere_is_one_of_all_and_says_where(results):
    first, second = (rank["second fails"] for rank in results)
    assert first == ["ConfigError", "no such folder (on rank 1)", True]
    assert second == ["ConfigError", "no such folder", True]
    first, second = (rank["second has a bug"] for rank in results)
    assert (
        first[0] == "RuntimeError" and first[1].startswith("rank 1: UnicodeDecodeError") and second[0] == "UnicodeDecodeError"
    )
