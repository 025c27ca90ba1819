"""What ranks do together outside of training: find each other, wait for one that works, or work and fail together.

An error on one rank must not leave the others in a collective that never ends, nor be lost because only rank 0 speaks.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed.distributed_c10d import _get_default_store

from sctd_ds.engine import place

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long ranks wait for the one that works: building a data set outlasts the ten minutes of a usual collective."""

Failure = tuple[type[Exception], str]

_calls = itertools.count()


def init_distributed() -> None:
    """deepspeed.init_distributed, if it has not run yet, on this rank's own device, whatever started the rank."""
    place.find()
    with _without_compiled_operator():
        deepspeed.init_distributed(verbose=False)
    # DeepSpeed sets the device in its engine only; a collective before that would find every rank on the first device.
    if get_accelerator().device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def _without_compiled_operator() -> Iterator[None]:
    """Let DeepSpeed start without the operator that it otherwise compiles on a CPU first, for more than a minute.

    Only its inference calls the operator, which reduces through shared memory; training reduces with gloo in any case.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # the name deepspeed.comm.torch is torch itself
    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build


def release_shared_memory() -> None:
    """Unlink DeepSpeed's shared memory, so that the system frees it with the last process. Every rank calls.

    Where DeepSpeed started itself on a CPU, each rank maps 66 MiB in /dev/shm, which DeepSpeed never unlinks: every run would
    take that memory for good.
    """
    if get_accelerator().device_name() == "cpu":
        dist.barrier()  # all ranks have mapped it, so nobody needs its name any more
        where, rank = (os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT")), dist.get_rank()
        name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *where, str(rank)])
        Path("/dev/shm", name).unlink(missing_ok=True)


def on_first(work: Callable[[], T]) -> T:
    """The result of `work`, done on rank 0 alone while the others wait, or its failure on every rank. All ranks call this.

    The result must be picklable.
    """
    # Through the store that the ranks found each other by: unlike a collective, it allows a wait of any length.
    store, key = _get_default_store(), f"sctd_ds/on_first/{next(_calls)}"
    if dist.get_rank() == 0:
        result, error = _attempt(work)
        store.set(key, pickle.dumps((result, _failure(error))))  # type: ignore[arg-type] # it takes bytes
        _raise_first(error, [_failure(error)])
        return result  # type: ignore[return-value]
    store.wait([key], PATIENCE)
    result, failure = pickle.loads(store.get(key))
    _raise_first(None, [failure])
    return result


def on_all(work: Callable[[], T]) -> T:
    """The result of `work` on this rank, or, if it failed on any rank, a failure on every rank. All ranks call this.

    `work` must do nothing collective.
    """
    result, error = _attempt(work)
    told: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, _failure(error))
    _raise_first(error, told)
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _failure(error: Exception | None) -> Failure | None:
    return None if error is None else (type(error), str(error))


def _raise_first(mine: Exception | None, told: list[Failure | None]) -> None:
    """Re-raise the local error, else the first remote one, keeping its type if it takes only a message.

    Its attribute `shared` says that every rank raises it, so only one of them has to tell the user.
    """
    for rank, failure in enumerate(told):
        if failure is None:
            continue
        kind, text = failure
        text += f" (on rank {rank})" if rank else ""
        plain = kind.__init__ in (ValueError.__init__, RuntimeError.__init__)
        error: Any = mine or (kind(text) if plain else RuntimeError(f"rank {rank}: {kind.__name__}: {text}"))
        error.shared = True
        raise error
