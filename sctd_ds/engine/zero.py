"""DeepSpeed's optimizer of ZeRO 1 and 2, computing the same without stopping the host.

DeepSpeed looks at one gradient after the other: more than 5,000 operations, too small to keep a GPU busy, for the 394
parameters of BERT-large. Then it reads overflow, norm and clipping factor from the device, one by one. Here the norms of all
gradients are one operation, and what the host has to know of them travels with the step's own sums and flags
(`StepLogic._agree`), in one all-reduce and one read-back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_REPLACED = (
    "step",
    "has_overflow",
    "scaled_global_norm",
    "_update_model_bit16_weights",
    "average_tensor",
    "_add_full_reduction_to_compact_grad_partition",
    "_add_to_grad_partition_buffer",
    "independent_gradient_partition_epilogue",
)
"""Methods of DeepSpeed's that a ZeroOptimizer overrides or calls. Without one of them ours might silently never run."""


class ZeroOptimizer(DeepSpeedZeroOptimizer):
    """`install` makes one of DeepSpeed's. Without `agree` before a `step`, the step is DeepSpeed's own.

    Scales, skipped steps and norms are DeepSpeed's bit for bit on one and two ranks. Among more, an all-reduce of several
    values may add them in another order than an all-reduce of one.
    """

    overlap_comm: bool
    _agreed: Sequence[float] | None = None

    # The update

    def gradient_sums(self) -> Tensor:
        """What ranks have to add up to know the gradient: [groups + 1] fp32, on the device.

        Of each group the squared norm of this rank's gradients, in the units of the loss scale, and last how many gradients
        are not finite. Call it after the last backward of a step.
        """
        squares: list[Tensor] = []
        norms: list[Tensor] = []
        for i, parameters in enumerate(self.params_in_partition):
            gradients = self.averaged_gradients[i]
            own = torch._foreach_norm(gradients, 2, dtype=get_norm_dtype())
            norms += own
            of_parameters = (norm for norm, g in zip(own, gradients, strict=True) if not getattr(g, "_zero_padding", False))
            counted = [norm for norm, p in zip(of_parameters, parameters, strict=False) if self._counts(p)]
            squares.append(torch.stack(counted).pow(2).sum().float() if counted else torch.zeros((), device=self.device))
        return torch.stack([*squares, torch.stack(norms).isfinite().logical_not().sum().float()])

    def agree(self, sums: Sequence[float]) -> None:
        """Take `gradient_sums`, added up over all ranks, for the next `step`."""
        self._agreed = sums

    def step(self, closure: Any = None) -> None:
        try:
            super().step(closure)
        finally:
            self._agreed = None

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        if self._agreed is None:
            return super().has_overflow(partition_gradients)
        return self._agreed[-1] != 0

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """A scalar on the host, so that what DeepSpeed decides by it needs no read-back; infinity where it is not finite."""
        if self._agreed is None:
            return super().scaled_global_norm(norm_type)
        norms = torch.tensor(self._agreed[:-1]).sqrt()
        return torch.linalg.vector_norm(norms).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """DeepSpeed makes every parameter a view of the flat group anew after each update, "just to be safe"."""
        flat = self.bit16_groups_flat[group_index]
        start, size = flat.data_ptr(), flat.element_size()
        views = zip(self.round_robin_bit16_groups[group_index], self.round_robin_bit16_offsets[group_index], strict=True)
        if any(parameter.data_ptr() != start + offset * size for parameter, offset in views):
            super()._update_model_bit16_weights(group_index)

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter belongs to the norm: what several ranks of a model hold is counted on one of them."""
        replicated = getattr(parameter, PIPE_REPLICATED, False)
        return not replicated and (self.model_parallel_rank == 0 or is_model_parallel_parameter(parameter))

    # The reduction of a micro-batch

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """One rank alone has nothing to average, but to convert what would travel in another dtype."""
        if dist.get_world_size(self.dp_process_group) > 1 or tensor.dtype != communication_data_type:
            super().average_tensor(tensor, communication_data_type)
        else:
            self._add_full_reduction_to_compact_grad_partition(tensor, communication_data_type)

    @staticmethod
    def _add_to_grad_partition_buffer(output: Tensor | None, source: Tensor) -> None:
        """Sums in fp32 of gradients in 16 bits, without DeepSpeed's copy in fp32 between them."""
        if output is not None:
            output.add_(source)

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward pass. With overlap_comm DeepSpeed has the host wait for the reduction; here the device does."""
        overlap = self.overlap_comm
        if overlap and self.contiguous_gradients and not get_accelerator().resolves_data_dependency():
            # The last bucket has no backward pass left to overlap with: reduced on this stream, it needs no other wait.
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
            self.overlap_comm = False
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.overlap_comm = overlap


def install(optimizer: Any, ranks: int) -> None:
    """Make a ZeroOptimizer of an engine's optimizer, in place. One that cannot be one stays as it is, with a warning.

    ranks: how many take part in `StepLogic._agree`; these have to be all that share the norm.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or type(optimizer) is ZeroOptimizer:
        return
    missing = [name for name in _REPLACED if not hasattr(DeepSpeedZeroOptimizer, name)]
    if missing:
        why = f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}"
    elif type(optimizer) is not DeepSpeedZeroOptimizer:
        why = f"{type(optimizer).__name__} has a step of its own"
    elif optimizer.cpu_offload or optimizer.has_moe_layers or "muon" in type(optimizer.optimizer).__name__.lower():
        why = "it knows no offload, no experts and no Muon"
    elif ranks != dist.get_world_size(optimizer.dp_process_group) * optimizer.model_parallel_world_size:
        why = "the norm is shared by other ranks than the step"
    else:
        optimizer.__class__ = ZeroOptimizer  # it adds no construction of its own
        optimizer.overlap_comm &= dist.get_world_size(optimizer.dp_process_group) > 1
        return
    logger.warning("updates are DeepSpeed's own, which wait for the device several times, as sctd_ds's cannot be used: %s", why)


def uninstall(optimizer: Any) -> None:
    """Make the optimizer DeepSpeed's own again."""
    if type(optimizer) is ZeroOptimizer:
        optimizer.__class__ = DeepSpeedZeroOptimizer
