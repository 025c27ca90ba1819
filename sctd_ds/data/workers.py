"""Processes that share the work of a build, and how far it has come."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

from tqdm import tqdm

from sctd_ds.data.files import DataError

logger = logging.getLogger(__name__)

EVERY = 30.0  # seconds between lines about progress, where there is no terminal

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Workers:
    """Calls functions in `count` processes, or in this one. A context manager: leaving it ends the processes."""

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:  # what they are at would be thrown away
            for process in processes:
                process.terminate()
                process.join()

    def each(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """The number of a task and what the function returns for it, in any order. Raises what the function raises."""
        if self.count == 1 or len(tasks) < 2:
            for number, task in enumerate(tasks):
                yield number, function(task)
            return
        if self._pool is None:
            # Forked from a clean process: this one may have threads, and its memory stays its own.
            context = get_context("forkserver")
            context.set_forkserver_preload(["sctd_ds.data.parts", "sctd_ds.data.rows"])
            self._pool = ProcessPoolExecutor(min(self.count, len(tasks)), context, _start)
        waiting: dict[Future[Result], int] = {}
        left = iter(enumerate(tasks))
        try:
            while True:
                for number, task in left:
                    waiting[self._pool.submit(function, task)] = number
                    if len(waiting) >= 2 * self.count:
                        break
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(done), done.result()
        except BrokenProcessPool:
            raise DataError(
                "a process of the build ended, probably for want of memory: repeat the command with fewer --num-proc. (A "
                'script of your own has to call build below `if __name__ == "__main__":`, or with num_proc=1.)'
            ) from None


def _start() -> None:
    """In a new process: end with the one that started it, leave Ctrl-C to it, and use one core."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Progress:
    """A bar on a terminal, elsewhere a line in the log every half minute. Counts bytes of text, or rows."""

    def __init__(self, what: str, total: int, unit: str = "B"):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._bar = tqdm(desc=what, total=total or None, unit=unit, unit_scale=True, disable=not sys.stderr.isatty())
        self._started = self._last = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._last >= EVERY:
            self._last = now
            logger.info("%s: %s", self.what, self._line(now))

    def close(self) -> None:
        self._bar.close()

    def _line(self, now: float) -> str:
        rate = self.done / (now - self._started)
        line = f"{human(self.done)}{self.unit} ({human(rate)}{self.unit}/s)"
        if self.total > self.done and rate:
            line = f"{self.done / self.total:.0%}, {line}, {duration((self.total - self.done) / rate)} left"
        return line


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "B") -> Iterator[Progress]:
    shown = Progress(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


def human(count: float) -> str:
    """A number with a unit prefix, such as 12.3M."""
    for prefix in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{prefix}"
        count /= 1000
    return f"{count:.3g}T"


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
