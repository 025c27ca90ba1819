"""What the kernel modules share: registration with torch.library, and guards around a launch."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels were defined under TRITON_INTERPRET=1 and so run in triton's interpreter, on CPU tensors too."""

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
    """Make `function`, which launches kernels, the operator `sctd_kernels::<its name>`, and return that operator.

    As an operator it passes through torch.compile without a graph break. It is defined through a `Library`, whose calls cost
    less on the host than those of `torch.library.custom_op`.

    Args:
        function: fully annotated; its schema is inferred from the annotations.
        fake: same signature; allocates outputs of the right shape, dtype and strides, and computes nothing.
        mutates: names of the arguments that are written in place.
        backward: `(ctx, *output_gradients) -> input gradients`. Without it the operator is not differentiable.
        setup_context: `(ctx, inputs, output) -> None`, saves what `backward` needs.
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
    """x itself if its last dimension is dense, which is all that the kernels ask for, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """Context in which the device of x is the current one, on which triton launches. Does nothing for CPU tensors."""
    return torch.cuda.device_of(x)


def block_of(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers `size`, within bounds."""
    return min(max(triton.next_power_of_2(size), smallest), largest)
