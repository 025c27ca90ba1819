"""One optimizer step with the method: what our data-parallel and our pipeline engine share."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sctd_ds.engine import reader
from sctd_ds.engine.random_state import file_of, random_state, set_random_state
from sctd_ds.engine.zero import ZeroOptimizer, install
from sctd_ds.method.convert import state_of
from sctd_ds.method.objective import PARTS
from sctd_ds.method.schedule import Mode, dropping_phase, step_mode
from sctd_ds.method.state import ScTD

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; raised on every rank, before the weights change."""

    shared = True
    """All ranks raise this, so only one has to print it."""


class NonFiniteLossError(TrainingError):
    """A micro-batch of the step had a NaN or infinite loss, on this rank or on another one (`here` tells)."""

    def __init__(self, step: int, here: list[str]) -> None:
        self.step, self.here, self.shared = step, here, not here
        where = f"on this rank, in {', '.join(here)}" if here else "on another rank"
        super().__init__(f"step {step}: the loss is not finite {where}; the weights are those of step {step - 1}")


class StepLogic(DeepSpeedEngine):
    """The schedule, the importance table and the checkpoint's additions, mixed in before the engine's own class."""

    def _attach(self) -> None:
        self.sctd: ScTD = state_of(self.module)
        dropping_phase(self.sctd.config)  # refuses dense phases that cannot be counted, before the first step
        self.stop_requested = False
        """Set on any rank, at any time: after the next step `stop_agreed` is true on all ranks."""
        self.stop_agreed = False
        self.step_parts: dict[str, float] = {}
        """Parts of the objective of the last step: means over its micro-batches and over all ranks."""
        self.forced_mode: Mode | None = None
        """Overrides the schedule: for measuring steps of one mode."""
        self._sums: dict[str, Tensor] = {}
        self._forwards = 0
        self.checkpoint_engine.load = reader.read  # DeepSpeed's own runs what a file tells it to
        install(self.optimizer, dist.get_world_size(self._group()))

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; DeepSpeed's global_steps also counts skipped ones."""
        return self.global_steps - self.skipped_steps

    @property
    def step_mode(self) -> Mode:
        """The mode of the step being computed."""
        return self.forced_mode or step_mode(self.sctd.config, self.applied_steps + 1)

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that agree on a step and share the table; None: all."""
        return None

    def _collect(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one micro-batch's objective to the step's."""
        for name, value in parts.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._forwards += 1

    def _take_model_step(self, lr_kwargs: Any) -> None:
        self._agree()
        try:
            super()._take_model_step(lr_kwargs)
        except Exception as error:  # DeepSpeed raises a bare Exception here
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                f"step {self.applied_steps + 1}: the fp16 loss scale is at its minimum and gradients still overflow. "
                "Use bf16, a smaller learning rate, a longer warmup or gradient_clipping=1.0; the last checkpoint is intact"
            ) from error
        if self._step_applied:
            self.sctd.importance.update(self._group())
        else:
            self.sctd.importance.discard()

    def _agree(self) -> None:
        """Before the update, with one small all-reduce and one read-back: is every loss finite, does any rank want to stop?

        With ZeRO 1 and 2 the gradient's norm and overflow are read here, too. A NaN or an infinity survives the sum over ranks,
        so all ranks see it and all raise. Ranks that compute no loss (all but a pipeline's last stage) count for nothing in the
        means.
        """
        # Filled on the device: a list that is copied to it, torch.tensor(..., device=), stops the host.
        zero, one = torch.zeros((), device=self.device), torch.ones((), device=self.device)
        means = [self._sums[name] / self._forwards if name in self._sums else zero for name in PARTS]
        flags = [one if flag else zero for flag in (*(name in self._sums for name in PARTS), self.stop_requested)]
        local = torch.stack([*means, *flags])
        if isinstance(self.optimizer, ZeroOptimizer):
            local = torch.cat([local, self.optimizer.gradient_sums()])
        self._sums, self._forwards = {}, 0
        total = local.clone()
        if dist.get_world_size(self._group()) > 1:
            dist.all_reduce(total, group=self._group())
        mine, everyone = torch.stack([local, total]).tolist()
        n = len(PARTS)
        counts, (stop, *gradient_sums) = everyone[n : 2 * n], everyone[2 * n :]
        self.stop_agreed = stop > 0
        self.step_parts = {name: x / c for name, x, c in zip(PARTS, everyone[:n], counts, strict=True) if c}
        if not math.isfinite(self.step_parts.get("loss", 0.0)):
            self.sctd.importance.discard()
            here = [name for name, value in zip(PARTS, mine[:n], strict=True) if not math.isfinite(value)]
            raise NonFiniteLossError(self.applied_steps + 1, here)
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.agree(gradient_sums)

    def parameter_names(self) -> dict[str, str]:
        """This rank's parameters: DeepSpeed's name -> the name in the model's state_dict."""
        return {name: name for name, _ in self.module.named_parameters()}

    def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen_parameters=False):
        """DeepSpeed's checkpoint plus the importance table (in the client state) and one file of random states per rank."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir) / tag
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(random_state(), file_of(folder, self.global_rank))
        own = {
            "importance": self.sctd.importance.state_dict(),
            "method": self.sctd.config.method,
            "names": self.parameter_names(),
        }
        return super().save_checkpoint(
            save_dir, tag, {**(client_state or {}), "sctd": own}, save_latest, exclude_frozen_parameters
        )

    def load_checkpoint(self, load_dir, tag=None, *args, **kwargs):
        """DeepSpeed's load plus what `save_checkpoint` added; a plain DeepSpeed checkpoint leaves the table as it is."""
        path, client = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        if path is None:
            return path, client
        own = client.pop("sctd", None)
        if own is None:
            logger.warning("%s holds no importance table (is it a dense run's checkpoint?): the table starts anew", path)
            return path, client
        self.sctd.importance.to(self.device)
        self.sctd.importance.load_state_dict(own["importance"])
        file = file_of(Path(path).parent, self.global_rank)
        if file.exists():
            set_random_state(reader.read(file))
        else:
            logger.warning("%s is missing (another number of ranks?): dropout continues from a new random state", file)
        return path, client
