"""Importance of vocabulary ids: sums of losses per id, and the moving average of their means.

Sums are exact, and therefore the same in every run: a loss is rounded to a multiple of 2**-20, float64 adds such numbers
without rounding while a sum is below 2**33, and exact additions commute. So the order of the atomics does not matter.

Shapes: N rows, V vocabulary.
"""

import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.launch import on_device_of, register_op
from sctd_kernels.reference import LOSS_RESOLUTION

BLOCK = 512
NUM_WARPS = 4
RESOLUTION = tl.constexpr(LOSS_RESOLUTION)
ROUNDER = tl.constexpr(1.5 * 2.0**52)  # adjacent float64 numbers differ by 1 here, so adding it rounds, ties to even


@triton.jit
def record_losses_kernel(stats_ptr, labels_ptr, losses_ptr, N, V, ignore_index, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + n, mask=n < N, other=-1).to(tl.int64)
    loss = tl.load(losses_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    valid = (label != ignore_index) & (label >= 0) & (label < V) & (tl.abs(loss) < float("inf"))
    rounded = ((loss.to(tl.float64) * (1 / RESOLUTION) + ROUNDER) - ROUNDER) * RESOLUTION
    tl.atomic_add(stats_ptr + label, rounded, mask=valid, sem="relaxed")
    tl.atomic_add(stats_ptr + V + label, tl.full([BLOCK], 1.0, tl.float64), mask=valid, sem="relaxed")


@triton.jit
def update_scores_kernel(scores_ptr, stats_ptr, V, decay: tl.float64, BLOCK: tl.constexpr):
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(stats_ptr + V + v, mask=v < V, other=0.0)
    seen = count > 0
    total = tl.load(stats_ptr + v, mask=seen, other=0.0)
    score = tl.load(scores_ptr + v, mask=seen, other=0.0).to(tl.float64)
    mean = total / tl.where(seen, count, 1.0)
    tl.store(scores_ptr + v, (decay * score + (1.0 - decay) * mean).to(tl.float32), mask=seen)


def record(stats: Tensor, labels: Tensor, losses: Tensor, ignore_index: int) -> None:
    N = labels.shape[0]
    with on_device_of(stats):
        record_losses_kernel[(triton.cdiv(N, BLOCK),)](
            stats, labels.contiguous(), losses.contiguous(), N, stats.shape[1], ignore_index,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def update(scores: Tensor, stats: Tensor, decay: float) -> None:
    V = scores.shape[0]
    with on_device_of(scores):
        update_scores_kernel[(triton.cdiv(V, BLOCK),)](scores, stats, V, decay, BLOCK=BLOCK, num_warps=NUM_WARPS)


record_losses = register_op(record, fake=lambda stats, labels, losses, ignore_index: None, mutates=("stats",))
update_scores = register_op(update, fake=lambda scores, stats, decay: None, mutates=("scores",))
