"""Softmax-KL of rows: KL(softmax(t) || softmax(s)) = sum_d p_d (log p_d - log q_d), p = softmax(t), q = softmax(s).

One program per row reads both rows once, in blocks, with running maxima. With u = t - max(t) and v = s - max(s),

    kl = sum e^u (u - v) / Z_t - log Z_t + log Z_s,        Z_t = sum e^u, Z_s = sum e^v

so a common offset of a row costs no precision. Backward reads both rows again and writes the required gradients:

    d kl / d s_d = q_d - p_d,        d kl / d t_d = p_d (log p_d - log q_d - kl)

Computing the gradients in the forward pass would save this second read, but the upstream gradient of each row is not known
then, and scaling stored gradients later would move more bytes.

Shapes: N rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sctd_kernels.launch import block_of, on_device_of, register_op, unit_last_stride

MIN_BLOCK, MAX_BLOCK = 256, 4096
MAX_BLOCK_BACKWARD = 2048  # backward needs no whole row per program, and more registers per element


def launch_sizes(D: int, largest: int = MAX_BLOCK) -> dict[str, int]:
    """16 elements of each row per thread."""
    block = block_of(D, MIN_BLOCK, largest)
    return {"BLOCK_D": block, "num_warps": max(1, block // 512)}


@triton.jit
def softmax_kl_kernel(teacher_ptr, student_ptr, kl_ptr, stats_ptr, N, D, teacher_stride, student_stride, BLOCK_D: tl.constexpr):
    """stats [5, N]: max(t), log Z_t, max(s), log Z_s, kl."""
    n = tl.program_id(0).to(tl.int64)
    teacher_ptr += n * teacher_stride
    student_ptr += n * student_stride
    t_max = tl.full([], -3.0e38, tl.float32)  # below any maximum; finite, so that the first differences are finite
    s_max = tl.full([], -3.0e38, tl.float32)
    t_sum = tl.full([], 0.0, tl.float32)
    s_sum = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    start = 0
    while start < D:
        d = start + tl.arange(0, BLOCK_D)
        t = tl.load(teacher_ptr + d, mask=d < D, other=float("-inf")).to(tl.float32)
        s = tl.load(student_ptr + d, mask=d < D, other=float("-inf")).to(tl.float32)
        t_new = tl.maximum(t_max, tl.max(t, axis=0))
        s_new = tl.maximum(s_max, tl.max(s, axis=0))
        u, v = t - t_new, s - s_new
        e = tl.exp(u)
        t_scale, shift = tl.exp(t_max - t_new), (t_max - t_new) - (s_max - s_new)
        weighted = t_scale * (weighted + t_sum * shift) + tl.sum(tl.where(d < D, e * (u - v), 0.0), axis=0)
        t_sum = t_scale * t_sum + tl.sum(e, axis=0)
        s_sum = tl.exp(s_max - s_new) * s_sum + tl.sum(tl.exp(v), axis=0)
        t_max, s_max = t_new, s_new
        start += BLOCK_D
    t_log, s_log = tl.log(t_sum), tl.log(s_sum)
    kl = weighted / t_sum - t_log + s_log
    tl.store(kl_ptr + n, kl)
    tl.store(stats_ptr + n, t_max)
    tl.store(stats_ptr + N + n, t_log)
    tl.store(stats_ptr + 2 * N + n, s_max)
    tl.store(stats_ptr + 3 * N + n, s_log)
    tl.store(stats_ptr + 4 * N + n, kl)


@triton.jit
def softmax_kl_backward_kernel(
    grad_ptr, teacher_ptr, student_ptr, stats_ptr, dteacher_ptr, dstudent_ptr,
    N, D, grad_stride, teacher_stride, student_stride,
    NEED_TEACHER: tl.constexpr, NEED_STUDENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.load(teacher_ptr + n * teacher_stride + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(student_ptr + n * student_stride + d, mask=d < D, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + n * grad_stride)
    log_p = (t - tl.load(stats_ptr + n)) - tl.load(stats_ptr + N + n)
    log_q = (s - tl.load(stats_ptr + 2 * N + n)) - tl.load(stats_ptr + 3 * N + n)
    p = tl.exp(log_p)
    if NEED_STUDENT:
        tl.store(dstudent_ptr + n * D + d, grad * (tl.exp(log_q) - p), mask=d < D)
    if NEED_TEACHER:
        kl = tl.load(stats_ptr + 4 * N + n)
        tl.store(dteacher_ptr + n * D + d, grad * p * ((log_p - log_q) - kl), mask=d < D)


def softmax_kl_forward(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """kl `[N]` and the row statistics `[5, N]` that backward needs, both float32."""
    N, D = teacher.shape
    teacher, student = unit_last_stride(teacher), unit_last_stride(student)
    kl = torch.empty(N, dtype=torch.float32, device=teacher.device)
    stats = torch.empty((5, N), dtype=torch.float32, device=teacher.device)
    with on_device_of(teacher):
        softmax_kl_kernel[(N,)](teacher, student, kl, stats, N, D, teacher.stride(0), student.stride(0), **launch_sizes(D))
    return kl, stats


def softmax_kl_backward(
    grad: Tensor, teacher: Tensor, student: Tensor, stats: Tensor, need_teacher: bool, need_student: bool
) -> tuple[Tensor, Tensor]:
    """Gradients [N, D]. A gradient that is not needed is an empty tensor and costs nothing."""
    N, D = teacher.shape
    teacher, student = unit_last_stride(teacher), unit_last_stride(student)
    dteacher = torch.empty((N, D) if need_teacher else 0, dtype=teacher.dtype, device=teacher.device)
    dstudent = torch.empty((N, D) if need_student else 0, dtype=student.dtype, device=student.device)
    sizes = launch_sizes(D, MAX_BLOCK_BACKWARD)
    with on_device_of(teacher):
        softmax_kl_backward_kernel[(N, triton.cdiv(D, sizes["BLOCK_D"]))](
            grad, teacher, student, stats, dteacher, dstudent,
            N, D, grad.stride(0), teacher.stride(0), student.stride(0),
            NEED_TEACHER=need_teacher, NEED_STUDENT=need_student, **sizes,
        )  # fmt: skip
    return dteacher, dstudent


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dkl: Tensor, _dstats: Tensor | None):
    need_teacher, need_student = ctx.needs_input_grad
    dteacher, dstudent = softmax_kl_backward_op(dkl, *ctx.saved_tensors, need_teacher, need_student)
    return dteacher if need_teacher else None, dstudent if need_student else None


softmax_kl_forward_op = register_op(
    softmax_kl_forward,
    fake=lambda teacher, student: (
        teacher.new_empty(teacher.shape[0], dtype=torch.float32),
        teacher.new_empty((5, teacher.shape[0]), dtype=torch.float32),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
softmax_kl_backward_op = register_op(
    softmax_kl_backward,
    fake=lambda grad, teacher, student, stats, need_teacher, need_student: (
        teacher.new_empty(teacher.shape if need_teacher else 0),
        student.new_empty(student.shape if need_student else 0),
    ),
)


def softmax_kl(teacher: Tensor, student: Tensor) -> Tensor:
    return softmax_kl_forward_op(teacher, student)[0]
