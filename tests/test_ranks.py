"""Ranks wait as long as the first one works; a failure on one rank fails all of them, and they know that they share it."""

import mmap
import os
import pickle
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from helpers.scenarios import run_scenarios, scenario
from sctd_ds import ConfigError
from sctd_ds.engine import ranks


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The scenarios of this file on two ranks."""
    return run_scenarios(__name__, tmp_path_factory.mktemp("ranks"), ranks=2)


def outcome(call, *arguments) -> list:
    """What `call` came to: ["result", value], or the error's type, text, and whether all ranks share it."""
    try:
        return ["result", call(*arguments)]
    except Exception as error:
        return [type(error).__name__, str(error), error.shared]


@scenario
def first_works_for_long(here):
    """For longer than any collective of the group may take. The other scenarios use the group, too."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))

    def slow() -> str:
        time.sleep(6)
        return f"made by {here.rank}"

    return outcome(ranks.on_first, slow)


def test_work_of_the_first_rank_may_outlast_a_collective(launched):
    assert [rank(first_works_for_long) for rank in launched] == [["result", "made by 0"]] * 2


@scenario
def all_work(here):
    return outcome(ranks.on_all, lambda: f"done by {here.rank}")


def test_every_rank_does_its_own(launched):
    assert [rank(all_work) for rank in launched] == [["result", "done by 0"], ["result", "done by 1"]]


def fail(error: Exception) -> None:
    raise error


@scenario
def first_fails(here):
    return outcome(ranks.on_first, lambda: fail(ConfigError("no such key")))


def test_a_failure_of_the_first_rank_is_one_of_all(launched):
    assert [rank(first_fails) for rank in launched] == [["ConfigError", "no such key", True]] * 2


@scenario
def second_fails(here):
    return outcome(ranks.on_all, lambda: here.rank == 1 and fail(ConfigError("no such folder")))


@scenario
def second_has_a_bug(here):
    """An error that takes more than a message to make."""
    return outcome(ranks.on_all, lambda: here.rank == 1 and fail(UnicodeDecodeError("utf-8", b"x", 0, 1, "why")))


def test_a_failure_elsewhere_is_one_of_all_and_says_where(launched):
    first, second = (rank(second_fails) for rank in launched)
    assert first == ["ConfigError", "no such folder (on rank 1)", True]
    assert second == ["ConfigError", "no such folder", True]
    first, second = (rank(second_has_a_bug) for rank in launched)
    assert first[0] == "RuntimeError" and first[1].startswith("rank 1: UnicodeDecodeError")
    assert second[0] == "UnicodeDecodeError"


@scenario
def told_without_pickles(here):
    """Whatever the ranks tell each other is read while no pickle can be."""
    readers = {(pickle, "loads"): pickle.loads, (distributed_c10d, "_unpickler"): distributed_c10d._unpickler}
    for module, name in readers:
        setattr(module, name, lambda *_: fail(AssertionError("a pickle was read")))
    try:
        return [outcome(ranks.on_first, lambda: {"a": [1, None]}), outcome(ranks.on_all, lambda: fail(ConfigError("no")))]
    finally:
        for (module, name), reader in readers.items():
            setattr(module, name, reader)


def test_ranks_read_no_pickles(launched):
    told = [["result", {"a": [1, None]}], ["ConfigError", "no", True]]
    assert [rank(told_without_pickles) for rank in launched] == [told] * 2


# Shared memory that a killed run left behind


def leave(folder: Path, name: str, age: float) -> Path:
    """A file of this user as DeepSpeed's shared memory is one, `age` seconds old."""
    file = folder / name.format(os.getuid())
    file.write_bytes(bytes(mmap.PAGESIZE))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_memory_that_nobody_maps_is_given_back(tmp_path):
    buffer, old = "deepspeed_allreduce_buffer_{}_127.0.0.1_", 2 * ranks.RENDEZVOUS
    leaked, mapped = leave(tmp_path, buffer + "1_0", old), leave(tmp_path, buffer + "1_1", old)
    kept = [mapped, leave(tmp_path, buffer + "2_0", 0), leave(tmp_path, "deepspeed_allreduce_buffer_{}1_x_3_0", old)]
    with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        ranks.remove_leaked_memory(tmp_path)
    assert not leaked.exists() and all(file.exists() for file in kept)


def test_a_start_gives_back_what_a_killed_one_left():
    leaked = leave(Path("/dev/shm"), "deepspeed_allreduce_buffer_{}_nowhere_1_0", 2 * ranks.RENDEZVOUS)
    ranks.init_distributed()
    assert not leaked.exists()
