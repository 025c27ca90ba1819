"""record_losses and update_scores: exact sums that no order of additions can change, and the moving average."""

from fractions import Fraction

import pytest
import torch
from sctd_kernels import record_losses, update_scores

from helpers.kernels import DEVICE, FLOATS

V = 13
BACKENDS = ["triton", "torch"]


def losses_and_labels(N, dtype=torch.float32):
    """Losses over ten orders of magnitude, some of them not finite, and labels with many duplicates."""
    losses = (torch.rand(N, device=DEVICE) * 10.0 ** torch.randint(-5, 4, (N,), device=DEVICE)).to(dtype)
    losses[::17], losses[5::17], losses[6::17] = float("nan"), float("inf"), -float("inf")
    labels = torch.randint(V, (N,), device=DEVICE)
    labels[::5] = -100
    return labels, losses


def recorded(backend, *parts):
    stats = torch.zeros(2, V, dtype=torch.float64, device=DEVICE)
    for labels, losses in parts:
        record_losses(stats, labels, losses, backend=backend)
    return stats


def exact(labels, losses):
    """Sums in rational arithmetic, of losses rounded to multiples of 2**-20."""
    stats = [[Fraction(0)] * V, [0] * V]
    for label, loss in zip(labels.tolist(), losses.double().tolist(), strict=True):
        if label >= 0 and abs(loss) < float("inf"):
            stats[0][label] += Fraction(round(Fraction(loss) * 2**20), 2**20)
            stats[1][label] += 1
    return torch.tensor([[float(x) for x in row] for row in stats], dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_example(backend):
    stats = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    labels = torch.tensor([2, 0, 2, -100], device=DEVICE)
    record_losses(stats, labels, torch.tensor([1.0, 5.0, 3.0, 9.0], device=DEVICE), backend=backend)
    assert stats.tolist() == [[5, 0, 4], [1, 0, 2]]
    scores = torch.full((3,), 10.0, device=DEVICE)
    update_scores(scores, stats, 0.5, backend=backend)
    assert scores.tolist() == [7.5, 10.0, 6.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("N", [1, 511, 2000])
def test_sums_are_exact(backend, dtype, N):
    labels, losses = losses_and_labels(N, dtype)
    assert torch.equal(recorded(backend, (labels, losses)), exact(labels, losses))


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_round_to_even(backend):
    losses = torch.tensor([0.5, 1.5, 2.5, -0.5], device=DEVICE) * 2.0**-20
    labels = torch.arange(4, device=DEVICE)
    assert torch.equal(recorded(backend, (labels, losses))[0, :4] * 2**20, torch.tensor([0.0, 2, 2, 0], device=DEVICE).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_order_or_grouping_changes_a_bit(backend):
    labels, losses = losses_and_labels(1500)
    whole = recorded(backend, (labels, losses))
    order = torch.randperm(1500, device=DEVICE)
    assert torch.equal(recorded(backend, (labels[order], losses[order])), whole)
    micro_batches = list(zip(labels[order].split(400), losses[order].split(400), strict=True))
    assert torch.equal(recorded(backend, *micro_batches), whole)
    ranks = [recorded(backend, micro_batch) for micro_batch in micro_batches]
    assert torch.equal(sum(ranks[1:], start=ranks[0]), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_record_changes_nothing(backend):
    labels = torch.tensor([-100, 1], dtype=torch.int32, device=DEVICE)
    losses = torch.tensor([1.0, float("nan")], device=DEVICE)
    assert recorded(backend, (labels, losses), (labels[:0], losses[:0])).eq(0).all()


def test_strided_losses_and_labels():
    labels, losses = losses_and_labels(600)
    assert torch.equal(recorded("triton", (labels[::2], losses[::2])), exact(labels[::2], losses[::2]))


def test_a_label_outside_the_vocabulary_adds_nothing():
    labels, losses = torch.tensor([V, -7, 10**9, 0], device=DEVICE), torch.ones(4, device=DEVICE)
    stats = recorded("triton", (labels, losses))
    assert stats.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 0.995, 1.0])
def test_update(backend, decay):
    """Seen ids move as the formula says in rational arithmetic, rounded once; the others keep every bit."""
    scores = torch.rand(700, device=DEVICE) * 10
    stats = torch.zeros(2, 700, dtype=torch.float64, device=DEVICE)
    stats[0, ::2], stats[1, ::2] = torch.arange(350.0, device=DEVICE).double() / 8, 7.0
    before, stats_before = scores.clone(), stats.clone()
    update_scores(scores, stats, decay, backend=backend)
    exact = [
        float(Fraction(decay) * Fraction(s) + (1 - Fraction(decay)) * Fraction(t) / 7)
        for s, t in zip(before[::2].tolist(), stats[0, ::2].tolist(), strict=True)
    ]
    assert torch.equal(scores[::2].cpu(), torch.tensor(exact, dtype=torch.float32))
    assert torch.equal(scores[1::2], before[1::2])
    assert torch.equal(stats, stats_before)
