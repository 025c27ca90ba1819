"""Where the kernel tests run: on the GPU if there is one, else in Triton's interpreter on the CPU. The tests are the same.

The interpreter must be chosen before Triton is imported, which transformers and DeepSpeed do too. So `pytest tests` collects
this folder before the test files beside it, and CI gives it a process of its own.
"""

import os
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError(
            "triton was imported before the kernel tests could choose its interpreter: run `pytest tests/kernels` on its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch):
    """Seeded generators, and new memory full of NaN, or of the largest integer: what a kernel leaves unwritten shows."""
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
