"""One run writes in a folder at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from sctd_ds.config import ConfigError

_held: dict[Path, TextIO] = {}


def check(folder: Path) -> None:
    """Raise ConfigError where `hold` could not create or write the folder, without creating it."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise _unwritable(folder, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{nearest} is not writable")


def hold(folder: Path, create: bool = True) -> None:
    """Lock a run's folder for the life of this process, however it ends. Raises ConfigError where another process holds it.

    The lock is one of the operating system on RUN/.lock, so a killed run leaves none behind. create: False leaves a folder
    that does not exist alone, because a run that is refused leaves nothing behind.
    """
    path = folder.resolve() / ".lock"
    if path in _held or not (create or folder.exists()):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"{folder}: {holder} is training there; wait for it, stop it, or choose another --output") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[path] = file


def _unwritable(folder: Path, why: object) -> ConfigError:
    return ConfigError(f"{folder}: the run cannot write there ({why}); choose another --output")
