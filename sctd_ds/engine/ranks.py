"""What ranks do together outside of training: find each other, wait for one that works, or work and fail together.

An error on one rank must not leave the others in a collective that never ends, nor be lost because only rank 0 speaks.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed.distributed_c10d import _get_default_store

from sctd_ds.config import ConfigError, one_line
from sctd_ds.engine import place
from sctd_ds.engine.operations import compiling

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long ranks wait for the one that works: building a data set outlasts the ten minutes of a usual collective."""

RENDEZVOUS = 60
"""Seconds after which no rank of a start needs the name of shared memory any more: ranks map it as soon as they have met."""

_BUFFER = "deepspeed_allreduce_buffer"
"""What DeepSpeed's shared memory is called, before user, address, port and rank."""

_calls = itertools.count()


def init_distributed() -> None:
    """deepspeed.init_distributed, if it has not run yet, on this rank's own device, whatever started the rank."""
    here = place.find()
    remove_leaked_memory()
    with compiling():
        deepspeed.init_distributed(verbose=False)
    # DeepSpeed sets the device in its engine only; a collective before that would find every rank on the first device.
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(here.local_rank)


def release_shared_memory() -> None:
    """Unlink DeepSpeed's shared memory, so that the system frees it with the last process. Every rank calls.

    Where DeepSpeed started itself on a CPU, each rank maps 66 MiB in /dev/shm, which DeepSpeed never unlinks: every run would
    take that memory for good.
    """
    if get_accelerator().device_name() == "cpu":
        dist.barrier()  # all ranks have mapped it, so nobody needs its name any more
        where, rank = (os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT")), dist.get_rank()
        name = "_".join([_BUFFER, str(os.getuid()), *where, str(rank)])
        Path("/dev/shm", name).unlink(missing_ok=True)


def remove_leaked_memory(folder: Path = Path("/dev/shm")) -> None:
    """Unlink this user's shared memory that a run left because it was killed before `release_shared_memory`.

    That is memory which no process maps, and which is older than the moment that other ranks of a start need its name for.
    """
    now, leaked = time.time(), []
    for file in folder.glob(f"{_BUFFER}_{os.getuid()}_*"):
        with suppress(FileNotFoundError):  # another start removes it, too
            status = file.stat()
            if status.st_uid == os.getuid() and now - status.st_mtime > RENDEZVOUS:
                leaked.append(file)
    mapped = _mapped_files() if leaked else ""
    for file in leaked:
        if f"{file}\n" not in mapped:
            file.unlink(missing_ok=True)


def _mapped_files() -> str:
    """The memory maps of all processes that this user may look at: one mapping a line, which ends with its file."""
    maps = []
    for file in Path("/proc").glob("[0-9]*/maps"):
        with suppress(PermissionError, FileNotFoundError, ProcessLookupError):  # of others, or ended meanwhile
            maps.append(file.read_text())
    return "".join(maps)


def on_first(work: Callable[[], T]) -> T:
    """The result of `work`, done on rank 0 alone while the others wait, or its failure on every rank. All ranks call this.

    The result is what JSON can hold, as JSON returns it: reading a pickle would run whatever its sender likes.
    """
    # Through the store that the ranks found each other by: unlike a collective, it allows a wait of any length.
    store, key = _get_default_store(), f"sctd_ds/on_first/{next(_calls)}"
    if dist.get_rank() == 0:
        text, error = _attempt(lambda: json.dumps(work()))
        store.set(key, json.dumps([text, _failure(error)]))
    else:
        store.wait([key], PATIENCE)
        error = None
    text, failure = json.loads(store.get(key))
    _raise_first(error, [failure])
    return json.loads(text)


def on_all(work: Callable[[], T]) -> T:
    """The result of `work` on this rank, or, if it failed on any rank, a failure on every rank. All ranks call this.

    `work` must do nothing collective.
    """
    result, error = _attempt(work)
    store, key = _get_default_store(), f"sctd_ds/on_all/{next(_calls)}"
    store.set(f"{key}/{dist.get_rank()}", json.dumps(_failure(error)))
    dist.barrier()  # unlike a wait at the store, it notices a rank that was killed
    _raise_first(error, [json.loads(store.get(f"{key}/{rank}")) for rank in range(dist.get_world_size())])
    return result  # type: ignore[return-value]


def tell(error: Exception) -> None:
    """Tell the other ranks of a failure before all have met, which they hear of in their first `on_all`.

    Without it, ranks on nodes where nothing fails would wait for this one, for half an hour.
    """

    def fail() -> None:
        raise error

    try:
        alone = place.find().world == 1
    except ConfigError:  # nobody knows who the others are
        return
    if alone:
        return
    try:
        init_distributed()
    except RuntimeError as reason:  # of torch.distributed: they did not come
        logger.error("the other ranks could not be told: %s", one_line(reason))
        return
    with suppress(Exception):  # the failure itself, which the caller has said, and those of other ranks
        on_all(fail)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _failure(error: Exception | None) -> list[str] | None:
    """What other ranks are told of an error: the module and the name of its type, and its text."""
    return None if error is None else [type(error).__module__, type(error).__qualname__, str(error)]


def _raise_first(mine: Exception | None, told: Sequence[list[str] | None]) -> None:
    """Re-raise the local error, else the first remote one, keeping its type if it takes only a message.

    Its attribute `shared` says that every rank raises it, so only one of them has to tell the user.
    """
    for rank, failure in enumerate(told):
        if failure is None:
            continue
        module, name, text = failure
        text += f" (on rank {rank})" if rank else ""
        kind: Any = getattr(sys.modules.get(module), name, None)  # only a type that this rank has imported itself
        plain = getattr(kind, "__init__", None) in (ValueError.__init__, RuntimeError.__init__)
        error: Any = mine or (kind(text) if plain else RuntimeError(f"rank {rank}: {name}: {text}"))
        error.shared = True
        raise error
