"""Token selection: the exact top K of every row, ties to the earlier position, positions in order, in one launch.

The kernel does not sort. It maps scores to integers of the same order, and a binary search over the integers
finds the largest threshold that at least K scores reach: at most 32 rounds of compare and count in registers,
fewer once the count is exactly K. One prefix sum then numbers the kept positions and resolves ties.

Shapes: B sequences, S tokens, K kept tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.launch import block_of, on_device_of, register_op

MAX_TOKENS = 8192  # one program holds a row in registers
MIN_BLOCK = 128


def launch_sizes(S: int) -> dict[str, int]:
    """One warp up to 512 tokens, whose counts need no barrier; at most 16 tokens per thread."""
    block = block_of(S, MIN_BLOCK, MAX_TOKENS)
    return {"BLOCK_S": block, "num_warps": max(1, block // 512)}


@triton.jit
def select_tokens_kernel(
    scores_ptr, ids_ptr, mask_ptr, kept_ptr, slot_ptr,
    V, S, K, ids_stride_b, ids_stride_s, mask_stride_b, mask_stride_s,
    HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK_S)
    inside = position < S
    token = tl.load(ids_ptr + b * ids_stride_b + position.to(tl.int64) * ids_stride_s, mask=inside, other=0)
    # An id outside the vocabulary violates the contract; it scores like padding, and no memory outside the table is read.
    real = inside & (token >= 0) & (token < V)
    if HAS_MASK:
        real &= tl.load(mask_ptr + b * mask_stride_b + position.to(tl.int64) * mask_stride_s, mask=inside, other=0) != 0
    score = tl.load(scores_ptr + token, mask=real, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))  # NaN
    score = tl.where(position == 0, float("inf"), score) + 0.0  # turns -0.0 into 0.0, which is equal but has other bits

    # The bits of non-negative floats are in order as integers; those of negative ones are, after
    # flipping the magnitude bits.
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(inside, key, -0x80000000)  # below every float

    low = tl.full([], -0x7F800001, tl.int32)  # the key of -inf
    high = tl.full([], 0x7F800000, tl.int32)  # the key of +inf
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= K, middle, low)
        high = tl.where(count > K, high, tl.where(count == K, middle, middle - 1))

    above = key > low
    tied = key == low
    room = K - tl.sum(above.to(tl.int32), axis=0)
    ranks = tl.cumsum((above.to(tl.int32) << 16) | tied.to(tl.int32), axis=0)  # both fit in 16 bits
    tied_rank = ranks & 0xFFFF
    keep = above | (tied & (tied_rank <= room))
    slot = (ranks >> 16) + tl.minimum(tied_rank, room) - 1
    tl.store(kept_ptr + b * K + slot, position, mask=keep)
    tl.store(slot_ptr + b * S + position, tl.where(keep, slot, -1), mask=inside)


def select(scores: Tensor, input_ids: Tensor, keep: int, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    B, S = input_ids.shape
    mask = attention_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    kept = torch.empty((B, keep), dtype=torch.int32, device=input_ids.device)
    slot = torch.empty((B, S), dtype=torch.int32, device=input_ids.device)
    with on_device_of(input_ids):
        select_tokens_kernel[(B,)](
            scores.contiguous(), input_ids, mask, kept, slot,
            scores.shape[0], S, keep, *input_ids.stride(), *((0, 0) if mask is None else mask.stride()),
            HAS_MASK=mask is not None, **launch_sizes(S),
        )  # fmt: skip
    return kept, slot


def _fake_select(scores, input_ids, keep, attention_mask):
    B, S = input_ids.shape
    return input_ids.new_empty((B, keep), dtype=torch.int32), input_ids.new_empty((B, S), dtype=torch.int32)


select_op = register_op(select, fake=_fake_select)


def select_tokens(scores: Tensor, input_ids: Tensor, keep: int, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return select_op(scores.detach(), input_ids, keep, attention_mask)
