"""GELU of a linear layer, and LayerNorm, whose backward passes sum the parameters' gradients on the way: one pass each.

    dx = dy gelu'(x),                                  db = sum of dx over rows
    dx = r (g - mean(g) - h mean(g h)),  g = dy w,     dw = sum of dy h over rows,  db = sum of dy over rows,
        h = (x - mean(x)) r,  r = 1 / sqrt(var(x) + eps)

Torch reads dx, or x and dy, once more for these sums. Here a program keeps the sums of its rows in registers and writes them to
a row of its own; torch adds these few rows. The split into programs depends on the shape alone, so every run rounds alike.
The forward passes are torch's. LayerNorm's backward computes mean and r from x again, which it reads anyway.

Shapes: M rows, N columns, D hidden size.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.launch import block_of, on_device_of, register_op

GELU_ROWS, GELU_BLOCK_M, GELU_BLOCK_N = 256, 8, 256
NORM_ROWS, NORM_STAGES, MIN_BLOCK_D, MAX_BLOCK_D = 32, 2, 256, 4096


@triton.jit
def gelu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, sums_ptr, M, N, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """sums: [programs along M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1).to(tl.int64) * ROWS
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        m = first + start + tl.arange(0, BLOCK_M)
        at = m[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # the normal distribution's share below x
        dx = dy * (below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
        tl.store(dx_ptr + at, dx, mask=inside)
        total += dx
    tl.store(sums_ptr + tl.program_id(1) * N + n, tl.sum(total, axis=0), mask=n < N)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr, M, D, eps,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums: [2, programs, D], of dw and of db."""
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in tl.range(0, ROWS, BLOCK_M, num_stages=STAGES):
        m = first + start + tl.arange(0, BLOCK_M)
        at = m[:, None] * D + d[None, :]
        inside = (m < M)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where((d < D)[None, :], x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
        scale = (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps))[:, None]
        normed = centred * scale
        g = dy * weight
        dx = scale * (g - (tl.sum(g, axis=1) / D)[:, None] - normed * (tl.sum(g * normed, axis=1) / D)[:, None])
        tl.store(dx_ptr + at, dx, mask=inside)
        dweight += dy * normed
        dbias += dy
    sums_ptr += tl.program_id(0) * D + d
    tl.store(sums_ptr, tl.sum(dweight, axis=0), mask=d < D)
    tl.store(sums_ptr + tl.num_programs(0) * D, tl.sum(dbias, axis=0), mask=d < D)


def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x [M, N], which holds bias [N] already: it is an argument so that backward gives it its gradient."""
    with torch.autocast(x.device.type, enabled=False):
        return F.gelu(x)


def gelu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dx `[M, N]` and the bias's gradient `[N]`, float32."""
    M, N = x.shape
    dy, x = dy.contiguous(), x.contiguous()
    grid = (triton.cdiv(N, GELU_BLOCK_N), triton.cdiv(M, GELU_ROWS))
    dx = torch.empty_like(x)
    sums = torch.empty((grid[1], N), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        gelu_backward_kernel[grid](
            dy, x, dx, sums, M, N, ROWS=GELU_ROWS, BLOCK_M=GELU_BLOCK_M, BLOCK_N=GELU_BLOCK_N, num_warps=4
        )
    return dx, sums.sum(0)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx `[M, D]` and the gradients of weight and bias `[2, D]`, float32."""
    M, D = x.shape
    dy, x = dy.contiguous(), x.contiguous()
    programs = triton.cdiv(M, NORM_ROWS)
    block = block_of(D, MIN_BLOCK_D, MAX_BLOCK_D)
    dx = torch.empty_like(x)
    sums = torch.empty((2, programs, D), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        layer_norm_backward_kernel[(programs,)](
            dy, x, weight.contiguous(), dx, sums, M, D, eps,
            ROWS=NORM_ROWS, STAGES=NORM_STAGES, BLOCK_M=1, BLOCK_D=block, num_warps=min(block // 256, 8),
        )  # fmt: skip
    return dx, sums.sum(1)


def _save_gelu(ctx, inputs, output) -> None:
    x, bias = inputs
    ctx.save_for_backward(x)
    ctx.bias_dtype = bias.dtype


def _gelu_gradients(ctx, dy: Tensor):
    dx, dbias = gelu_backward_op(dy, *ctx.saved_tensors)
    return dx, dbias.to(ctx.bias_dtype)


def _save_layer_norm(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _layer_norm_gradients(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    dx, sums = layer_norm_backward_op(dy, x, weight, ctx.eps)
    return dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None


gelu_forward_op = register_op(
    gelu_forward, fake=lambda x, bias: torch.empty_like(x), backward=_gelu_gradients, setup_context=_save_gelu
)
gelu_backward_op = register_op(
    gelu_backward, fake=lambda dy, x: (x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=torch.float32))
)
layer_norm_forward_op = register_op(
    layer_norm_forward,
    fake=lambda x, weight, bias, eps: x.new_empty(x.shape),
    backward=_layer_norm_gradients,
    setup_context=_save_layer_norm,
)
layer_norm_backward_op = register_op(
    layer_norm_backward,
    fake=lambda dy, x, weight, eps: (x.new_empty(x.shape), x.new_empty((2, x.shape[1]), dtype=torch.float32)),
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # The product adds the bias, and GELU's backward computes its gradient.
    before = F.linear(x, weight, bias.detach())
    return gelu_forward_op(before.flatten(0, -2), bias).view(before.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm_forward_op(x.flatten(0, -2), weight, bias, eps).view(x.shape)
