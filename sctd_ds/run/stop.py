"""What stops a run before its last step: a signal to a rank, or the end of a process that started it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_RUNNER = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"}
"""The `deepspeed` command: a script, or a module behind `python -m`."""


def listen(engine: Any) -> None:
    """Let SIGTERM, SIGHUP and Ctrl-C ask for a checkpoint and a stop after the step; a second Ctrl-C stops at once.

    SIGHUP stays ignored where it is: under nohup.
    """

    def request(number: int, frame: Any) -> None:
        engine.stop_requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, request)


class Launcher:
    """What started this rank, and tells it nothing when it is killed: its parent and, where DeepSpeed started it, the
    `deepspeed` command above launch.py, which does not notice either. A rank that was started by hand has no launcher.
    """

    def __init__(self, launched: bool) -> None:
        """launched: whether a launcher started this rank."""
        self._levels = 1 + _runner_is_above() if launched else 0
        self._at_start = _ancestors(self._levels)

    def is_lost(self) -> bool:
        """Whether one of these processes has ended since this object was made."""
        return _ancestors(self._levels) != self._at_start


def _ancestors(levels: int) -> list[int]:
    """The process ids of this process's parent, of its parent, and so on; fewer where one has ended."""
    found = [os.getpid()]
    with suppress(psutil.NoSuchProcess):
        while len(found) <= levels:
            found.append(psutil.Process(found[-1]).ppid())
    return found[1:]


def _runner_is_above() -> bool:
    """Whether the parent's parent is the `deepspeed` command."""
    with suppress(psutil.Error):
        words = psutil.Process(_ancestors(2)[-1]).cmdline()[:3]
        return not _RUNNER.isdisjoint(Path(word).name for word in words)
    return False
