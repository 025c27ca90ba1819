"""One run writes in a folder at a time, and all its ranks write in the same one."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from sctd_ds.config import ConfigError
from sctd_ds.engine import ranks

logger = logging.getLogger(__name__)

_held: dict[Path, TextIO] = {}


def share(folder: Path, create: bool = True) -> None:
    """The first rank holds a run's folder, and all ranks prove that they see the same one. Every rank calls.

    Raises ConfigError where another run holds it (see `hold`) and where nodes have folders of their own, because a checkpoint
    needs the files of all ranks in one folder.
    """
    content = ranks.on_first(lambda: hold(folder, create))
    try:
        ranks.on_all(lambda: _look(folder, content))
    except ConfigError:
        ranks.on_first(lambda: _release(folder))
        raise


def hold(folder: Path, create: bool = True) -> str | None:
    """Lock a run's folder for the life of this process, however it ends. Returns what its lock says: this process and a
    random word. Raises ConfigError where another process holds it.

    The lock is one of the operating system on RUN/.lock, so a killed run leaves none behind. create: False leaves a folder
    that does not exist alone and returns None, because a run that is refused leaves nothing behind.
    """
    path = folder.resolve() / ".lock"
    if path in _held:
        return path.read_text(encoding="utf-8")
    if not (create or folder.exists()):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: the run cannot write there ({error}); choose another --output") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.readline().strip() or "another process"
        file.close()
        raise ConfigError(f"{folder}: {holder} is training there; wait for it, stop it, or choose another --output") from None
    except OSError as error:
        logger.warning("%s: its file system has no locks (%s), so nothing stops a second run in this folder", folder, error)
    content = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n"
    file.truncate(0)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())  # other nodes read it while it is open here
    _held[path] = file
    return content


def _look(folder: Path, content: str | None) -> None:
    file, seen = folder / ".lock", None
    with suppress(OSError):
        seen = file.read_text(encoding="utf-8")
    if content is not None and seen != content:
        raise ConfigError(
            f"{folder.absolute()} on {socket.gethostname()} is not the folder in which the first rank writes, and a checkpoint "
            "has files of every rank: give --output a folder that all nodes share"
        )


def _release(folder: Path) -> None:
    """Leave nothing of a refused run behind."""
    path = folder.resolve() / ".lock"
    path.unlink(missing_ok=True)
    _held.pop(path).close()
    with suppress(OSError):  # not empty: it was there before
        folder.rmdir()
