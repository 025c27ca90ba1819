"""This rank's random states, in types that torch.load reads with weights_only=True."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def random_state() -> dict[str, Any]:
    """The states of python's, numpy's, torch's and the device's generators."""
    version, words, gauss = random.getstate()
    name, keys, *numbers = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *numbers],
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *numbers = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numbers))
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])


def file_of(folder: Path, rank: int) -> Path:
    """Where a checkpoint keeps the random state of `rank`."""
    return folder / f"sctd_random_rank{rank:05d}.pt"
