"""DeepSpeed's data-parallel engine (ZeRO 0, 1, 2) with the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sctd_ds.engine.step import StepLogic
from sctd_ds.method.convert import set_mode


class ScTDEngine(StepLogic):
    """A DeepSpeedEngine whose forward follows the method's schedule: `engine(**batch)`, `backward`, `step` as ever."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            return super().forward(*inputs, **kwargs)
        set_mode(self.module, self.step_mode, self.applied_steps + 1)
        output = super().forward(*inputs, **kwargs)
        self._collect(self.sctd.parts)
        return output

    def train_batch(self, batches: Iterator[Mapping[str, Tensor]]) -> float:
        """One optimizer step over the next `gradient_accumulation_steps` micro-batches; returns the mean loss of all ranks.

        Puts a model that was left in evaluation mode back into training mode.
        """
        if not self.module.training:
            self.train()
        for _ in range(self.gradient_accumulation_steps()):
            batch = {key: value.to(self.device, non_blocking=True) for key, value in next(batches).items()}
            loss = self(**batch).loss
            self.backward(loss)
            self.step()
        return self.step_parts["loss"]

    def _group(self) -> dist.ProcessGroup | None:
        return self.seq_data_parallel_group
