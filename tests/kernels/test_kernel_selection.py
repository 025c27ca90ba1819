"""select_tokens: the kernel against its reference, and the reference against a sort in Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sctd_kernels import reference, select_tokens

from helpers.kernels import DEVICE, random_shapes

SHAPES = [(1, 1, 1), (2, 7, 7), (3, 37, 1), (2, 130, 77), (2, 512, 256), (1, 1000, 999), (1, 2048, 5), (1, 4096, 2048)]
ODD_SCORES = [0.0, -0.0, 1.0, 1.0, 10.0, 10.0, 9.999999, 1e4, -1.0, -2.5, 1e-40, math.nan, math.inf, -math.inf]


def best_by_sorting(scores, ids, keep, mask):
    """Positions kept in one row, from the words of the specification."""
    score = [scores[i] for i in ids]
    score = [-math.inf if math.isnan(s) or (mask and not m) else s for s, m in zip(score, mask or ids, strict=True)]
    score[0] = math.inf
    return sorted(sorted(range(len(ids)), key=lambda p: (-score[p], p))[:keep])


def check(scores, ids, keep, mask=None):
    kept, slot = select_tokens(scores, ids, keep, mask, backend="triton")
    expected_kept, expected_slot = reference.select_tokens(scores, ids, keep, mask)
    assert torch.equal(kept, expected_kept) and torch.equal(slot, expected_slot)
    assert kept.dtype == slot.dtype == torch.int32
    for b in range(ids.shape[0]):
        expected = best_by_sorting(scores.tolist(), ids[b].tolist(), keep, None if mask is None else mask[b].tolist())
        assert kept[b].tolist() == expected
        assert [slot[b, p].item() for p in expected] == list(range(keep))
        assert (slot[b] >= 0).sum() == keep


def test_example():
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0], device=DEVICE)
    ids = torch.tensor([[0, 3, 1, 3, 2], [1, 1, 1, 1, 1]], device=DEVICE)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], device=DEVICE)
    kept, slot = select_tokens(scores, ids, 3, mask, backend="triton")
    assert kept.tolist() == [[0, 1, 3], [0, 1, 2]]
    assert slot.tolist() == [[0, 1, -1, 2, -1], [0, 1, 2, -1, -1]]


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-S{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("vocabulary", [3, 30522], ids=["ties", "few ties"])
def test_kernel_is_exact(shape, vocabulary):
    B, S, K = shape
    scores = torch.rand(vocabulary, device=DEVICE) * 10
    check(scores, torch.randint(vocabulary, (B, S), device=DEVICE), K)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("real", [0, 1, 9, 40], ids="{} real tokens".format)
def test_padding_comes_last(dtype, real):
    mask = (torch.arange(40, device=DEVICE) < real).to(dtype).expand(2, 40)
    ids = torch.randint(9, (2, 40), device=DEVICE)
    check(torch.rand(9, device=DEVICE), ids, 10, mask)


@random_shapes
@given(data=st.data(), S=st.integers(1, 40), B=st.integers(1, 2))
def test_any_scores(data, S, B):
    """Ties, signed zeros, subnormals, infinities and NaN, with random masks."""
    keep = data.draw(st.integers(1, S))
    scores = torch.tensor(data.draw(st.permutations(ODD_SCORES)), device=DEVICE)
    row = st.lists(st.integers(0, len(ODD_SCORES) - 1), min_size=S, max_size=S)
    ids = torch.tensor(data.draw(st.lists(row, min_size=B, max_size=B)), dtype=torch.int32, device=DEVICE)
    flags = st.lists(st.booleans(), min_size=S, max_size=S)
    mask = data.draw(st.none() | st.lists(flags, min_size=B, max_size=B))
    check(scores, ids, keep, mask if mask is None else torch.tensor(mask, device=DEVICE))


def test_signed_zeros_are_equal():
    """The earlier position wins, whichever zero it holds."""
    scores = torch.tensor([0.0, -0.0], device=DEVICE)
    check(scores, torch.tensor([[0, 1, 0], [0, 0, 1]], device=DEVICE), 2)


def test_any_strides():
    scores = torch.rand(200, device=DEVICE)[::2]
    ids = torch.randint(100, (50, 6), device=DEVICE).T[::2]
    mask = torch.randint(2, (3, 100), device=DEVICE)[:, ::2]
    check(scores, ids, 20, mask)


def test_an_id_outside_the_vocabulary_reads_no_foreign_memory():
    """It breaks the contract, but the kernel must neither fault nor return fewer than K tokens."""
    ids = torch.tensor([[1, 10**9, 2, -(10**9), 3]], device=DEVICE)
    kept, _ = select_tokens(torch.rand(5, device=DEVICE), ids, 4, backend="triton")
    assert kept.tolist() == [[0, 1, 2, 4]]
