"""Kernel tests run on the GPU if there is one, else in triton's interpreter on the CPU: the same tests.

The interpreter must be chosen before triton is first imported, and transformers and DeepSpeed import it too. pytest collects
this folder before the test files beside it, so one run of everything works.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError(
            "triton was imported before tests/kernels could choose its interpreter: run `pytest tests/kernels` on its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory holds NaN, or the largest integer, so that an element which a kernel leaves unwritten shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if type(out) is torch.Tensor and out.dtype != torch.bool:
                out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
            return out

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
