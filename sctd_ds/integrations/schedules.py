"""Learning-rate schedules of transformers for DeepSpeed's engine.

A run asks for one with `"scheduler": {"type": "transformers.warmup_stable_decay", "params": {...}}`; the types and their
parameters are `deepspeed_schema.TRANSFORMERS_SCHEDULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers
from deepspeed.runtime.lr_schedules import update_lr
from torch.optim import Optimizer


class Schedule:
    """A schedule of transformers with the methods of DeepSpeed's own.

    Its state is the number of steps alone, under DeepSpeed's name and counted alike. So the rates are always those of the run's
    file: after a resume with another peak, and when a run starts from a checkpoint of a run with another schedule.
    """

    def __init__(self, optimizer: Optimizer, name: str, params: Mapping[str, Any]) -> None:
        """name: a transformers.SchedulerType. params: all arguments of its function but the optimizer."""
        rest = dict(params)
        steps = rest.pop("num_warmup_steps"), rest.pop("num_training_steps", None)
        built = transformers.get_scheduler(name, optimizer, *steps, scheduler_specific_kwargs=rest)
        self._peaks, self._factors = built.base_lrs, built.lr_lambdas
        self.optimizer = optimizer
        self.last_batch_iteration = -1
        """The steps taken, less one."""

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set the rates of the next step, after one more step was taken, or after `last_batch_iteration` + 1 of them."""
        self.last_batch_iteration = self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        taken = self.last_batch_iteration + 1
        rates = [peak * factor(taken) for peak, factor in zip(self._peaks, self._factors, strict=True)]
        update_lr(self.optimizer.param_groups, rates)

    def get_last_lr(self) -> list[float]:
        """The rates of the next step, one for each group of parameters."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]


def of(block: Mapping[str, Any] | None) -> Callable[[Optimizer], Schedule] | None:
    """What builds the schedule of a "scheduler" block, for `initialize(lr_scheduler=...)`; None without a block."""
    if block is None:
        return None
    return partial(Schedule, name=block["type"].removeprefix("transformers."), params=block["params"])
