"""The control of a run: dense training with the same operations, which token dropping has to beat to be worth anything."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sctd_ds.config import ConfigError
from sctd_ds.method.flops import Shape, flops_saved
from sctd_ds.run.settings import RunConfig

logger = logging.getLogger(__name__)


def equal_compute(run: RunConfig, shape: Shape) -> dict[str, Any]:
    """The configuration of dense training with as many operations as `run`: fewer steps, and a decay of their length.

    Whatever the run resolved from "auto" stands there as a value, so it is for the same number of ranks.
    """
    steps = round(run.pretrain.steps * (1 - flops_saved(shape, run.sctd)))
    deepspeed = run.whole_deepspeed()
    schedule = deepspeed.get("scheduler", {}).get("params", {})
    for key in ("total_num_steps", "num_training_steps", "num_decay_steps"):
        if key in schedule:
            schedule[key] = round(schedule[key] * steps / run.pretrain.steps)
    if "num_decay_steps" in schedule:  # the warm-up stays, and both must fit
        schedule["num_decay_steps"] = min(
            schedule["num_decay_steps"], schedule["num_training_steps"] - schedule["num_warmup_steps"]
        )
    pretrain = {**run.pretrain.model_dump(exclude_defaults=True, exclude={"early_stopping"}), "steps": steps}
    return {**deepspeed, "sctd": {"method": "dense"}, "pretrain": pretrain}


def write(run: RunConfig, shape: Shape, data: str | list[str], file: Path) -> None:
    """Write `equal_compute` on `data` to a new file. Raises ConfigError for a run that is dense itself, and for a file that
    exists or cannot be written."""
    if run.sctd.method == "dense":
        raise ConfigError("--write-control: the run is dense itself; give the configuration of a run that drops tokens")
    control = equal_compute(run, shape)
    control["pretrain"]["data"] = data
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:  # never over a file that somebody may have edited
            stream.write(json.dumps(control, indent=2) + "\n")
    except FileExistsError:
        raise ConfigError(f"--write-control {file}: the file exists; choose another name, or delete it") from None
    except OSError as error:
        raise ConfigError(f"--write-control {file}: cannot be written ({error})") from None
    steps = control["pretrain"]["steps"]
    logger.info("%s: %d steps of dense training have the operations of these %d", file, steps, run.pretrain.steps)
