"""Scenarios: functions of a test file that run on every rank of a real launch, for the tests beside them to look at.

    @scenario
    def one_step(here):
        engine = make_engine()
        return {"loss": engine.train_batch(batches(here.rank))}

    @pytest.fixture(scope="module")
    def ranks(tmp_path_factory):
        return run_scenarios(__name__, tmp_path_factory.mktemp("engine"), ranks=2)

    def test_ranks_agree_on_the_loss(ranks):
        first, second = ranks
        assert first(one_step) == second(one_step)

A start of `deepspeed` takes longer than most scenarios. So one launch runs all scenarios of a file, one after the other in the
order in which the file defines them, and a later one may build on what an earlier one left in `here.folder` or in the process.

A scenario that fails does not hide the others. What a scenario returns, or its traceback, is kept by scenario and rank, and a
test fails only if it reads a scenario that failed, with that traceback. After a failure on all ranks the launch continues with
the next scenario. After a failure on some ranks only, the others may wait in a collective for ever, so the launch ends: tests
that read what did not run are told what failed. A scenario that hangs is ended after `TIME_LIMIT`, and every rank prints where
it was.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.launch import launch

TIME_LIMIT = 400
"""Seconds that one scenario may take; the longest take ten on an idle machine."""
PATIENCE = 10
"""Seconds that a rank whose scenario failed waits for the others to reach the end of theirs."""


@dataclass(frozen=True)
class Here:
    """Where a scenario runs. `folder` is shared by the ranks, by all launches of a file, and by its tests."""

    folder: Path
    world: int
    rank: int


def scenario(function: Callable | None = None, *, cases: Iterable = ((),), ranks: Iterable[int] | None = None) -> Callable:
    """Mark a function of one argument, `Here`, to run under the launcher and to return tensors and plain Python values.

    Args:
        cases: further arguments, to run the function once with each (a tuple for several): each is a scenario of its own.
        ranks: the numbers of ranks it runs with (default: all that the file launches).
    """

    def mark(function: Callable) -> Callable:
        function.cases = [case if isinstance(case, tuple) else (case,) for case in cases]
        function.worlds = ranks
        return function

    return mark if function is None else mark(function)


class Rank:
    """One rank of a finished launch: called with a scenario and the case's arguments, it gives what that returned here."""

    def __init__(self, results: Path, world: int, index: int, output: str) -> None:
        self.world, self.index = world, index
        self._results, self._output = results, output

    def __call__(self, function: Callable, *case: Any) -> Any:
        name = label(function, *case)
        kept = result_file(self._results, name, self.index)
        if kept.exists():
            return torch.load(kept, weights_only=True)
        failures = sorted(self._results.glob("*.failed"), key=lambda file: file.stat().st_mtime)
        told = "\n\n".join(f"{file.stem}:\n{file.read_text()}" for file in failures)
        told = told or f"no scenario failed; the output of the launch ends with\n{self._output[-3000:]}"
        pytest.fail(f"{name} has no result on rank {self.index} of {self.world}.\n{told}", pytrace=False)


def run_scenarios(module: str, folder: Path, ranks: int) -> list[Rank]:
    """Launch the scenarios of a test file on `ranks` ranks. `module` is its `__name__`, `folder` its `Here.folder`."""
    results = folder / f"{ranks}_ranks"
    results.mkdir()
    done = launch("helpers.scenarios", module, folder, ranks=ranks)
    names = [label(function, *case) for function, case in scenarios(sys.modules[module], ranks)]
    if all(result_file(results, name, rank).exists() for name in names for rank in range(ranks)):
        assert done.returncode == 0, done.stdout[-3000:]  # else the tests that read what is missing say what failed
    return [Rank(results, ranks, rank, done.stdout) for rank in range(ranks)]


def scenarios(module: ModuleType, world: int) -> Iterator[tuple[Callable, tuple]]:
    """The scenarios of a file for launches of `world` ranks, in order: each function with each case's arguments."""
    for function in list(vars(module).values()):
        marked = hasattr(function, "cases") and function.__module__ == module.__name__
        if marked and (function.worlds is None or world in function.worlds):
            yield from ((function, case) for case in function.cases)


def label(function: Callable, *case: Any) -> str:
    """As pytest writes a test with its parameters."""
    return function.__name__ + (f"[{'-'.join(map(str, case))}]" if case else "")


def result_file(results: Path, name: str, rank: int) -> Path:
    return results / f"{name} on rank {rank}.pt"


def main() -> int:
    """On a rank: run the scenarios of a file. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", help="set by the launcher")
    parser.add_argument("module", help="name of the test file's module")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    here = Here(arguments.folder, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    results = here.folder / f"{here.world}_ranks"
    for function, case in scenarios(importlib.import_module(arguments.module), here.world):
        name = label(function, *case)
        kept = result_file(results, name, here.rank)
        temporary = kept.with_suffix(".part")
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
        try:
            torch.save(function(here, *case), temporary)
            temporary.rename(kept)
        except (Exception, pytest.fail.Exception):
            traceback.print_exc()
            temporary.write_text(traceback.format_exc())
            temporary.rename(kept.with_suffix(".failed"))
        if not same_end(results, name, here):
            return 1
        faulthandler.cancel_dump_traceback_later()
    return 0


def same_end(results: Path, name: str, here: Here) -> bool:
    """Whether all ranks came through `name`, or all failed in it. Waits for the others, `PATIENCE` seconds after a failure."""
    files = [result_file(results, name, rank) for rank in range(here.world)]
    deadline = time.monotonic() + PATIENCE
    while True:
        passed = [file.exists() for file in files]
        failed = [file.with_suffix(".failed").exists() for file in files]
        if all(passed) or all(failed):
            return True
        if any(failed) and (sum(passed) + sum(failed) == here.world or time.monotonic() > deadline):
            return False
        time.sleep(0.01)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status:
        os._exit(status)  # threads of a rank that failed may wait for other ranks, and an ordinary exit for these threads
