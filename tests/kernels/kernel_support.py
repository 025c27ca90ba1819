"""Helpers of the kernel tests: the device, random routings, layouts of a tensor, and the accepted error.

The tests run on the GPU if there is one, else in triton's interpreter on the CPU. The interpreter must be selected before the
import of triton, which transformers and DeepSpeed import, too. So a test file imports this one before `sctd_kernels`, and
pytest collects this folder before the other test files. (A conftest.py here would hide the one above from the tests that
import it.)
"""

import os
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError(
            "triton was imported before the kernel tests could choose its interpreter: run `pytest tests/kernels` on its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

random_shapes = settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch):
    """Seeded generators, and new memory filled with NaN or the largest integer, which exposes what a kernel does not write.

    A test file activates it by importing it.
    """
    torch.manual_seed(0)

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if type(out) is Tensor and out.dtype != torch.bool:
                out.detach().fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
            return out

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


def gpu(test: Callable) -> Callable:
    """Mark a test that only a CUDA device can run."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")(test))


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def random_routing(B: int, S: int, K: int) -> tuple[Tensor, Tensor]:
    """kept and slot of a random selection, without the code under test."""
    kept = torch.stack([torch.randperm(S)[:K].sort().values for _ in range(B)]) if B else torch.empty(0, K)
    slot = torch.full((B, S), -1)
    for b, k in torch.cartesian_prod(torch.arange(B), torch.arange(K)).tolist():
        slot[b, kept[b, k]] = k
    return kept.int().to(DEVICE), slot.int().to(DEVICE)


LAYOUTS = {
    "dense": lambda x: x,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "rows in a wider buffer": lambda x: torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :],
    "first dimensions swapped": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "last dimensions swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}
"""The same values in another memory layout."""


def assert_as_good_as_torch(name: str, kernel: Tensor, torch_result: Tensor, truth: Tensor, scale: float | None = None) -> None:
    """Compare the errors of the kernel's and torch's results. truth: the reference in float64.

    In addition to torch's own error, the kernel may have the error of some float32 roundings of numbers of size `scale` (by
    default the largest of `truth`), and of one rounding to a 16-bit result's dtype.
    """
    assert (kernel.shape, kernel.dtype) == (torch_result.shape, torch_result.dtype), f"{name}: {kernel.shape}, {kernel.dtype}"
    last_rounding = 0.0 if kernel.dtype == torch.float32 else torch.finfo(kernel.dtype).eps / 2
    if kernel.dtype == torch.bfloat16 and DEVICE == "cpu":
        last_rounding *= 2  # triton's interpreter truncates the last bits, while a GPU rounds
    kernel, torch_result, truth = (t.detach().double().flatten() for t in (kernel, torch_result, truth))
    scale = truth.abs().max().item() if scale is None else scale
    allowed = (torch_result - truth).abs() + last_rounding * truth.abs() + 16 * torch.finfo(torch.float32).eps * scale
    excess = ((kernel - truth).abs() - allowed).nan_to_num(nan=float("inf"))
    worst = excess.argmax()
    assert excess[worst] <= 0, (
        f"{name}[{worst}]: the kernel computes {kernel[worst]}, torch {torch_result[worst]}, the truth is {truth[worst]}:"
        f" {excess[worst]} above torch's error and rounding"
    )
