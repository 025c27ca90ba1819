"""Token routing: take the kept rows out of a sequence, and put them back.

    gather    y[b, k] = x[b, kept[b, k]]                            adjoint of scatter
    scatter   x[b, s] = y[b, slot[b, s]], or 0 if s is dropped      adjoint of gather
    merge     z[b, s] = y[b, slot[b, s]], or x[b, s] if dropped     adjoint of unmerge
    unmerge   x = z with kept rows zero, y = gather(z)              adjoint of merge

`slot` is the inverse of `kept`, so every output row has one known source: each operator is a single pass that writes
every row once, without atomics and zero-filled tensors, and reads only the rows that it needs. gather, scatter and
merge are one kernel with different sources; unmerge writes two outputs from one read and has its own kernel.

Shapes: B sequences, S tokens, K kept tokens, D hidden size; n is S or K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.launch import block_of, on_device_of, register_op, unit_last_stride

TILE_BYTES = 8192  # per program of 4 warps: four 16-byte accesses in flight per thread
NUM_WARPS = 4
MIN_BLOCK_D, MAX_BLOCK_D = 128, 1024


def tile(D: int, itemsize: int) -> dict[str, int]:
    """Rows and columns of one program's tile. If possible, the columns divide D, so that no lane is idle."""
    divisor = D & -D
    block = min(divisor, MAX_BLOCK_D) if divisor >= MIN_BLOCK_D else block_of(D, MIN_BLOCK_D, MAX_BLOCK_D)
    return {"ROWS": TILE_BYTES // (block * itemsize), "BLOCK_D": block}


@triton.jit
def _tile_of_program(n, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(b, rows [ROWS], columns [BLOCK_D]) of this program; columns vary fastest, then rows, then sequences."""
    pid = tl.program_id(0)
    blocks_d = tl.cdiv(D, BLOCK_D)
    blocks_n = tl.cdiv(n, ROWS)
    block_d = pid % blocks_d
    block_n = (pid // blocks_d) % blocks_n
    b = (pid // blocks_d // blocks_n).to(tl.int64)
    return b, block_n * ROWS + tl.arange(0, ROWS), block_d * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def take_rows_kernel(
    a_ptr, b_ptr, index_ptr, out_ptr,
    n, D, a_stride_b, a_stride_s, b_stride_b, b_stride_s,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[i] = a[index[i]] where index[i] >= 0, else b[i]; a missing source reads as zeros.

    Example: index = [1, -1, 0], a = [p, q], b = [u, v, w] -> out = [q, v, p].
    """
    b, rows, columns = _tile_of_program(n, D, ROWS, BLOCK_D)
    in_row = (columns < D)[None, :]
    index = tl.load(index_ptr + b * n + rows, mask=rows < n, other=-1)
    taken = index >= 0
    value = tl.zeros([ROWS, BLOCK_D], dtype=out_ptr.dtype.element_ty)
    # Two masked loads, one of which takes effect: selecting between two pointers would narrow
    # accesses to one element, and a load into the registers of the first would wait for it.
    if HAS_A:
        a = a_ptr + (b * a_stride_b + index.to(tl.int64) * a_stride_s)
        value = tl.load(a[:, None] + columns[None, :], mask=taken[:, None] & in_row, other=0.0)
    if HAS_B:
        other = b_ptr + (b * b_stride_b + rows.to(tl.int64) * b_stride_s)
        untaken = (index < 0) & (rows < n)
        other_value = tl.load(other[:, None] + columns[None, :], mask=untaken[:, None] & in_row, other=0.0)
        value = tl.where(taken[:, None], value, other_value)
    out = out_ptr + (b * n + rows) * D
    tl.store(out[:, None] + columns[None, :], value, mask=(rows < n)[:, None] & in_row)


@triton.jit
def split_rows_kernel(
    z_ptr, slot_ptr, x_ptr, y_ptr,
    n, K, D, z_stride_b, z_stride_s,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Read z once: y[slot[i]] = z[i] and x[i] = 0 where slot[i] >= 0, x[i] = z[i] elsewhere."""
    b, rows, columns = _tile_of_program(n, D, ROWS, BLOCK_D)
    slot = tl.load(slot_ptr + b * n + rows, mask=rows < n, other=-1)
    taken = (slot >= 0)[:, None]
    in_row = (columns < D)[None, :]
    inside = (rows < n)[:, None] & in_row
    z = z_ptr + (b * z_stride_b + rows.to(tl.int64) * z_stride_s)
    value = tl.load(z[:, None] + columns[None, :], mask=inside)
    x = x_ptr + (b * n + rows) * D
    tl.store(x[:, None] + columns[None, :], tl.where(taken, 0.0, value), mask=inside)
    y = y_ptr + (b * K + slot) * D
    tl.store(y[:, None] + columns[None, :], value, mask=taken & in_row)


def _grid(B: int, n: int, D: int, sizes: dict[str, int]) -> tuple[int]:
    return (B * triton.cdiv(n, sizes["ROWS"]) * triton.cdiv(D, sizes["BLOCK_D"]),)


def _take_rows(index: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """`index` [B, n], `a` [B, m, D] and `b` [B, n, D], of which one may be None for zeros -> [B, n, D]."""
    like = a if a is not None else b
    assert like is not None
    (B, n), D = index.shape, like.shape[2]
    sizes = tile(D, like.element_size())
    a, b = (None if t is None else unit_last_stride(t) for t in (a, b))
    out = torch.empty((B, n, D), dtype=like.dtype, device=like.device)
    with on_device_of(out):
        take_rows_kernel[_grid(B, n, D, sizes)](
            a, b, index.contiguous(), out,
            n, D,
            *((0, 0) if a is None else a.stride()[:2]),
            *((0, 0) if b is None else b.stride()[:2]),
            HAS_A=a is not None, HAS_B=b is not None, **sizes, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def gather(x: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    return _take_rows(kept, x, None)


def scatter(y: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    return _take_rows(slot, y, None)


def merge(x: Tensor, y: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    return _take_rows(slot, y, x)


def unmerge(z: Tensor, kept: Tensor, slot: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    """(x [B, S, D], y [B, K, D]). An output that is not needed is an empty tensor and costs nothing."""
    if not need_x:
        return z.new_empty(0), _take_rows(kept, z, None) if need_y else z.new_empty(0)
    if not need_y:
        return _take_rows(slot, None, z), z.new_empty(0)
    (B, S, D), K = z.shape, kept.shape[1]
    sizes = tile(D, z.element_size())
    z = unit_last_stride(z)
    x = torch.empty((B, S, D), dtype=z.dtype, device=z.device)
    y = torch.empty((B, K, D), dtype=z.dtype, device=z.device)
    with on_device_of(z):
        split_rows_kernel[_grid(B, S, D, sizes)](
            z, slot.contiguous(), x, y, S, K, D, *z.stride()[:2], **sizes, num_warps=NUM_WARPS
        )
    return x, y


def _save_routing(ctx, inputs, output) -> None:
    kept, slot = inputs[-2:]
    ctx.save_for_backward(kept, slot)


def _gather_backward(ctx, dy: Tensor):
    return scatter_op(dy, *ctx.saved_tensors), None, None


def _scatter_backward(ctx, dx: Tensor):
    return gather_op(dx, *ctx.saved_tensors), None, None


def _merge_backward(ctx, dz: Tensor):
    need_x, need_y = ctx.needs_input_grad[:2]
    dx, dy = unmerge_op(dz, *ctx.saved_tensors, need_x, need_y)
    return dx if need_x else None, dy if need_y else None, None, None


gather_op = register_op(
    gather,
    fake=lambda x, kept, slot: x.new_empty(*kept.shape, x.shape[2]),
    backward=_gather_backward,
    setup_context=_save_routing,
)
scatter_op = register_op(
    scatter,
    fake=lambda y, kept, slot: y.new_empty(*slot.shape, y.shape[2]),
    backward=_scatter_backward,
    setup_context=_save_routing,
)
merge_op = register_op(
    merge,
    fake=lambda x, y, kept, slot: x.new_empty(x.shape),
    backward=_merge_backward,
    setup_context=_save_routing,
)
unmerge_op = register_op(
    unmerge,
    fake=lambda z, kept, slot, need_x, need_y: (
        z.new_empty(z.shape if need_x else 0),
        z.new_empty((*kept.shape, z.shape[2]) if need_y else 0),
    ),
)

gather_tokens = gather_op
merge_tokens = merge_op
