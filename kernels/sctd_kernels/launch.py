"""Helpers of the kernel modules: registration with torch.library, and launch settings."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels were defined under TRITON_INTERPRET=1, and so run in triton's interpreter, which takes CPU tensors."""

NAMESPACE = "sctd_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register_op(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `function`, which launches kernels, as the operator `sctd_kernels::<its name>`, and return the operator.

    torch.compile includes an operator without a graph break. Operators of a `Library` cost less
    time on the host than those of `torch.library.custom_op`.

    Args:
        function: fully annotated; the operator's schema is inferred from the annotations.
        fake: same signature; allocates outputs of the right shape, dtype and strides, and computes nothing.
        mutates: names of the arguments that the operator writes in place.
        backward: `(ctx, *output_gradients) -> input gradients`. Without it, the operator is not differentiable.
        setup_context: `(ctx, inputs, output) -> None`, saves the tensors that `backward` needs.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def unit_last_stride(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense, as the kernels require, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """A context that makes the device of x current, because triton launches there. Does nothing for CPU tensors."""
    return torch.cuda.device_of(x)


def block_of(size: int, smallest: int, largest: int) -> int:
    """The next power of two from `size` on, within bounds."""
    return min(max(triton.next_power_of_2(size), smallest), largest)
