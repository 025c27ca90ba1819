"""Cross-entropy of rows: loss = logsumexp(x) - x[label], and its gradient (softmax(x) - onehot(label)) * upstream.

Forward reads the logits once, backward reads them once and writes the gradient: 3 passes over [N, V], the minimum if the
upstream gradient of each row is known only in backward. Rows with an ignored label are not read; their gradient is zero.

The gradient may be written over the logits, which saves the largest tensor of a BERT step. Nothing here can know who else
holds the logits, so this happens only when the caller asks for it, and then the version counter of the logits is raised:
whoever saved them for a backward of their own, or runs this one twice, gets autograd's RuntimeError and not a wrong gradient.

Shapes: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.launch import on_device_of, register_op, unit_last_stride

BLOCK_V = 4096
NUM_WARPS = 8
STAGES = 3


@triton.jit
def _add_block(maximum, total, x):
    """Running (max, sum of exp(x - max)) with one more block."""
    updated = tl.maximum(maximum, tl.max(x, axis=0))
    return updated, total * tl.exp(maximum - updated) + tl.sum(tl.exp(x - updated), axis=0)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, stats_ptr,
    N, V, logits_stride, ignore_index, WHOLE_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """stats [2, N]: max(x), log(sum of exp(x - max)); not written for ignored rows, which backward does not read."""
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    if label == ignore_index:
        tl.store(loss_ptr + n, 0.0)
    else:
        logits_ptr += n * logits_stride
        maximum = tl.full([], -3.0e38, tl.float32)  # below any maximum; finite, so that a block of -inf adds 0
        total = tl.full([], 0.0, tl.float32)
        if WHOLE_BLOCKS > 0:
            # No mask, which would prevent wide loads if V is odd. The next blocks are on their way during each.
            for block in tl.range(0, WHOLE_BLOCKS, num_stages=STAGES):
                x = tl.load(logits_ptr + block * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.float32)
                maximum, total = _add_block(maximum, total, x)
        if WHOLE_BLOCKS * BLOCK_V < V:
            v = WHOLE_BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            maximum, total = _add_block(maximum, total, x)
        log_total = tl.log(total)
        in_range = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + n, (maximum - target) + log_total)
        tl.store(stats_ptr + n, maximum)
        tl.store(stats_ptr + N + n, log_total)


@triton.jit
def cross_entropy_backward_kernel(
    grad_ptr, logits_ptr, labels_ptr, stats_ptr, dlogits_ptr,
    N, V, grad_stride, logits_stride, dlogits_stride, ignore_index, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dlogits may be logits."""
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    logits_ptr += n * logits_stride
    dlogits_ptr += n * dlogits_stride
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(dlogits_ptr + v, tl.zeros([BLOCK_V], dtype=tl.float32), mask=v < V)
    else:
        grad = tl.load(grad_ptr + n * grad_stride)
        maximum = tl.load(stats_ptr + n)
        log_total = tl.load(stats_ptr + N + n)
        x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        p = tl.exp((x - maximum) - log_total)
        tl.store(dlogits_ptr + v, grad * (p - (v == label).to(tl.float32)), mask=v < V)


def cross_entropy_forward(logits: Tensor, labels: Tensor, ignore_index: int, overwrite_logits: bool) -> tuple[Tensor, Tensor]:
    """Losses `[N]` and the row statistics `[2, N]` that backward needs, both float32."""
    N, V = logits.shape
    logits = unit_last_stride(logits)
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    stats = torch.empty((2, N), dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        cross_entropy_kernel[(N,)](
            logits, labels.contiguous(), loss, stats, N, V, logits.stride(0), ignore_index,
            WHOLE_BLOCKS=V // BLOCK_V, BLOCK_V=BLOCK_V, STAGES=STAGES, num_warps=NUM_WARPS,
        )  # fmt: skip
    return loss, stats


def _launch_backward(grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, dlogits: Tensor) -> None:
    N, V = logits.shape
    with on_device_of(logits):
        cross_entropy_backward_kernel[(N, triton.cdiv(V, BLOCK_V))](
            grad, logits, labels.contiguous(), stats, dlogits,
            N, V, grad.stride(0), logits.stride(0), dlogits.stride(0), ignore_index,
            BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip


def cross_entropy_backward(grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch_backward(grad, unit_last_stride(logits), labels, stats, ignore_index, dlogits)
    return dlogits


def cross_entropy_backward_(grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int) -> None:
    """Write the gradient over the logits."""
    _launch_backward(grad, logits, labels, stats, ignore_index, logits)
    torch.autograd.graph.increment_version(logits)


def _setup_context(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index, ctx.overwrite_logits = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dloss: Tensor, _dstats: Tensor | None):
    logits, labels, stats = ctx.saved_tensors
    if ctx.overwrite_logits:
        dlogits = logits.detach()  # the same memory and version counter
        cross_entropy_backward_op_(dloss, dlogits, labels, stats, ctx.ignore_index)
    else:
        dlogits = cross_entropy_backward_op(dloss, logits, labels, stats, ctx.ignore_index)
    return dlogits, None, None, None


cross_entropy_forward_op = register_op(
    cross_entropy_forward,
    fake=lambda logits, labels, ignore_index, overwrite_logits: (
        logits.new_empty(logits.shape[0], dtype=torch.float32),
        logits.new_empty((2, logits.shape[0]), dtype=torch.float32),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
cross_entropy_backward_op = register_op(
    cross_entropy_backward,
    fake=lambda grad, logits, labels, stats, ignore_index: logits.new_empty(logits.shape),
)
cross_entropy_backward_op_ = register_op(
    cross_entropy_backward_,
    fake=lambda grad, logits, labels, stats, ignore_index: None,
    mutates=("logits",),
)


def token_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, overwrite_logits: bool) -> Tensor:
    # Rows that share memory (an expanded tensor) cannot each hold their own gradient.
    separate = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return cross_entropy_forward_op(logits, labels, ignore_index, overwrite_logits and separate)[0]
