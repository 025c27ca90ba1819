"""What ranks do together outside of training: one works while the others wait, or all work and fail together.

An error on one rank must not leave the others in a collective that never ends, nor be lost because only rank 0 speaks.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long ranks wait for the one that works: building a data set outlasts the ten minutes of a usual collective."""

Failure = tuple[type[Exception], str]

_calls = itertools.count()


def on_first(work: Callable[[], T]) -> T:
    """The result of `work`, done on rank 0 alone while the others wait, or its failure on every rank. All ranks call this.

    The result must be picklable.
    """
    # Through the store that the ranks found each other by: unlike a collective, it may be waited for as long as one likes.
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
    """The result of `work` on this rank, or, where it failed on any rank, a failure on every rank. All ranks call this.

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
    """Raise this rank's own error, or else the first of the others', of the same kind where it is one of words alone.

    Its attribute `shared` says that every rank raises: one of them may tell the user.
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
