"""Operations that DeepSpeed compiles when a machine first needs them: a kill meanwhile must not stop the next start.

torch guards a compilation with a file that only its creator deletes. If that process is killed, every later start waits for
the file, for ever and without a word.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)


@contextmanager
def compiling() -> Iterator[None]:
    """Within it, DeepSpeed compiles and loads an operation under a lock that dies with its holder; the first rank says so.

    The operation that it would compile first on a CPU, for more than a minute, is left out: only inference calls it, to reduce
    through shared memory, while training reduces with gloo in any case.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # the name deepspeed.comm.torch is torch itself
    load, build_shm_op = cpp_extension.load, backend.build_shm_op
    cpp_extension.load, backend.build_shm_op = partial(_load, load), lambda: None
    try:
        yield
    finally:
        cpp_extension.load, backend.build_shm_op = load, build_shm_op


def _load(load: Callable[..., Any], name: str, sources: Sequence[str], **options: Any) -> Any:
    """torch's `load`, alone on this machine, and past the lock file of a process that was killed."""
    folder = Path(cpp_extension._get_build_directory(name, verbose=False)).resolve()
    library = folder / f"{name}.so"
    built = library.stat().st_mtime if library.exists() else 0
    if os.environ.get("LOCAL_RANK", "0") == "0" and built < max(os.path.getmtime(source) for source in sources):
        logger.warning("DeepSpeed compiles its operation %s for this machine: once, for a minute or several", name)
    with (folder / "sctd_ds.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # the file system has no locks
            logger.warning("%s: cannot be locked (%s); if a start hangs, delete the file `lock` there", folder, error)
        else:
            _remove_stale(folder / "lock")
        return load(name=name, sources=sources, **options)


def _remove_stale(lock: Path) -> None:
    """Delete torch's lock file once nobody compiles any more who created it."""
    told = False
    while lock.exists() and (process := _compiler(lock)):
        if not told:
            logger.warning("waiting for process %d, which compiles in %s", process.pid, lock.parent)
        told = True
        time.sleep(0.2)
    lock.unlink(missing_ok=True)


def _compiler(lock: Path) -> psutil.Process | None:
    """The process that holds torch's lock file open, or the ninja that a killed one left at work in the same folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or ended meanwhile
            orphan = process.name() == "ninja" and process.cwd() == str(lock.parent)
            if orphan or any(file.path == str(lock) for file in process.open_files()):
                return process
    return None
