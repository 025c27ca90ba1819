"""Reading what torch.save wrote, without running what a file may contain.

A pickle names the functions that it calls, and DeepSpeed's own reader calls them all. Here a file can call only what torch
allows (tensors, containers, numbers) and `ALLOWED`.
"""

from __future__ import annotations

import re
from os import PathLike
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

ALLOWED = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]
"""The classes in DeepSpeed's files: where a parameter's share lies, ZeRO's stage, the loss scale. The rest of them, states of
models, learning-rate schedules and of torch's, DeepSpeed's and apex's optimizers, is tensors and plain values."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or continued with these settings."""

    shared = False
    """Whether all ranks raise it, so only one has to print it."""


def read(path: str | PathLike[str], map_location: Any = "cpu") -> Any:
    """The content of a file of torch.save. map_location: as torch.load takes it.

    Raises CheckpointError for a file that is damaged, or that calls anything else than torch's types, `ALLOWED` and what the
    program added with torch.serialization.add_safe_globals; it names what it calls.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch's readers raise anything on damaged bytes
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". In PyTorch")[0]
    if called is None:
        raise CheckpointError(f"{path} cannot be loaded ({reason})")
    raise CheckpointError(
        f"{path} was not loaded: it calls {called[1]}, which a checkpoint has no need to call. Use another checkpoint; a "
        "script that saved such an object can allow it with torch.serialization.add_safe_globals"
    )
