"""The public functions: they check their arguments, choose a backend and call it.

`backend="auto"` runs the Triton kernel for CUDA tensors and the torch reference elsewhere; `"triton"` and `"torch"` force one.
For meta tensors, which hold no values, it allocates what the Triton kernel would.
Under `TRITON_INTERPRET=1` (set before importing triton) `"triton"` also takes CPU tensors, which is slow and meant for tests.
Wrong arguments raise ValueError in one line. No function makes the host wait for the device, so *values* are not checked:
`kept` and `slot` must come from `select_tokens`.

Shapes: B sequences, S tokens, K kept tokens, D hidden size, V vocabulary, N rows.
"""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from sctd_kernels import reference

if importlib.util.find_spec("triton") is not None:
    from sctd_kernels import backward, cross_entropy, divergence, importance, routing, selection
    from sctd_kernels.launch import INTERPRETED

    HAS_TRITON = True
else:
    HAS_TRITON = INTERPRETED = False

Backend = Literal["auto", "triton", "torch"]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64)


def _use_triton(backend: Backend, x: Tensor) -> bool:
    if backend == "torch":
        return False
    if backend == "auto":
        return (x.is_cuda or x.is_meta) and HAS_TRITON
    if backend != "triton":
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if not HAS_TRITON:
        raise ValueError("backend='triton' needs the triton package: install it, or use backend='torch'")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {x.device}: use backend='torch', or set TRITON_INTERPRET=1 before"
            " importing triton to run the kernels in its interpreter"
        )
    return True


def _expect_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {allowed}, got {str(x.dtype).removeprefix('torch.')}: cast it")


def _expect_float(name: str, x: Tensor, triton: bool) -> None:
    if triton:
        if x.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{name} is {x.dtype}, the Triton kernels take float32, float16 or bfloat16: use backend='torch'")
    elif not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}: cast it")


def _expect_shape(name: str, x: Tensor, shape: tuple[int, ...], why: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} {why}, got {list(x.shape)}")


def _expect_dim(name: str, x: Tensor, dims: str) -> None:
    if x.dim() != len(dims.split(",")):
        raise ValueError(f"{name} must be [{dims}], got {list(x.shape)}")


def _expect_device(x_name: str, x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but {x_name} is on {x.device}: move them to one device")


def _expect_routing(x: Tensor, kept: Tensor, slot: Tensor) -> None:
    _expect_dim("x", x, "B, S, D")
    _expect_dim("kept", kept, "B, K")
    _expect_shape("slot", slot, x.shape[:2], "like the first two dimensions of x")
    if kept.shape[0] != x.shape[0] or not 1 <= kept.shape[1] <= x.shape[1]:
        raise ValueError(f"kept must be [{x.shape[0]}, K] with 1 <= K <= {x.shape[1]} to match x, got {list(kept.shape)}")
    _expect_dtype("kept", kept, (torch.int32,))
    _expect_dtype("slot", slot, (torch.int32,))
    _expect_device("x", x, kept=kept, slot=slot)


def select_tokens(
    scores: Tensor, input_ids: Tensor, keep: int, attention_mask: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Keep the `keep` tokens of highest score in every sequence, in their order.

    A token's score is `scores[id]`. Position 0 is always kept; padding (mask == 0) and NaN scores come last; ties go to the
    earlier position. A sequence with fewer than `keep` real tokens keeps them all, and its first padding.

    Args:
        scores: `[V]` float32, one score per vocabulary id. No gradient flows to it.
        input_ids: `[B, S]` int64 or int32, each in `[0, V)`.
        keep: K, the number of tokens to keep, `1 <= K <= S`.
        attention_mask: `[B, S]` bool or integer, 0 at padding; None: no padding.

    Returns:
        kept: `[B, K]` int32, the kept positions, ascending.
        slot: `[B, S]` int32, the inverse: the index of a position in `kept`, or -1 if it was dropped.

    Raises:
        ValueError: a shape, dtype or device is wrong, `keep` is out of range, or S is above 8192 on the Triton backend.

    Example:
        >>> scores = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> select_tokens(scores, torch.tensor([[0, 3, 1, 3, 2]]), keep=3)
        (tensor([[0, 1, 3]], dtype=torch.int32), tensor([[ 0,  1, -1,  2, -1]], dtype=torch.int32))
    """
    triton = _use_triton(backend, input_ids)
    _expect_dim("scores", scores, "V")
    _expect_dtype("scores", scores, (torch.float32,))
    _expect_dim("input_ids", input_ids, "B, S")
    _expect_dtype("input_ids", input_ids, INDEX_DTYPES)
    _expect_device("input_ids", input_ids, scores=scores)
    if not 1 <= keep <= input_ids.shape[1]:
        raise ValueError(f"keep must be between 1 and S = {input_ids.shape[1]}, got {keep}")
    if attention_mask is not None:
        _expect_shape("attention_mask", attention_mask, input_ids.shape, "like input_ids")
        _expect_dtype("attention_mask", attention_mask, MASK_DTYPES)
        _expect_device("input_ids", input_ids, attention_mask=attention_mask)
    if not triton:
        return reference.select_tokens(scores.detach(), input_ids, keep, attention_mask)
    if input_ids.shape[1] > selection.MAX_TOKENS:
        raise ValueError(
            f"input_ids has S = {input_ids.shape[1]}, the Triton kernel takes up to {selection.MAX_TOKENS}: use backend='torch'"
        )
    return selection.select_tokens(scores, input_ids, keep, attention_mask)


def gather_tokens(x: Tensor, kept: Tensor, slot: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Take the kept tokens out of every sequence: `y[b, k] = x[b, kept[b, k]]`.

    The gradient of a dropped token is zero, written in the same pass as the others.

    Args:
        x: `[B, S, D]` float32, float16 or bfloat16 (float64 too on the torch backend); any strides, best with a last one of 1.
        kept: `[B, K]` int32 and
        slot: `[B, S]` int32, as `select_tokens` returns them.

    Returns:
        `[B, K, D]`, contiguous, dtype of x. Differentiable in x.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
        >>> gather_tokens(x, kept=torch.tensor([[0, 2]]).int(), slot=torch.tensor([[0, -1, 1, -1]]).int())
        tensor([[[1.],
                 [3.]]])
    """
    triton = _use_triton(backend, x)
    _expect_routing(x, kept, slot)
    _expect_float("x", x, triton)
    return routing.gather_tokens(x, kept, slot) if triton else reference.gather_tokens(x, kept, slot)


def merge_tokens(x: Tensor, y: Tensor, kept: Tensor, slot: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Put tokens back: a copy of x with its kept rows replaced by those of y, `z[b, kept[b, k]] = y[b, k]`.

    Args:
        x: `[B, S, D]` float32, float16 or bfloat16 (float64 too on the torch backend); any strides, best with a last one of 1.
        y: `[B, K, D]`, dtype of x.
        kept: `[B, K]` int32 and
        slot: `[B, S]` int32, as `select_tokens` returns them.

    Returns:
        `[B, S, D]`, contiguous, dtype of x. Differentiable in x (zero at the kept rows) and in y.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> x, y = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), torch.tensor([[[10.0], [30.0]]])
        >>> merge_tokens(x, y, kept=torch.tensor([[0, 2]]).int(), slot=torch.tensor([[0, -1, 1, -1]]).int())
        tensor([[[10.],
                 [ 2.],
                 [30.],
                 [ 4.]]])
    """
    triton = _use_triton(backend, x)
    _expect_routing(x, kept, slot)
    _expect_float("x", x, triton)
    _expect_shape("y", y, (*kept.shape, x.shape[2]), "to match kept and x")
    _expect_dtype("y", y, (x.dtype,))
    _expect_device("x", x, y=y)
    return routing.merge_tokens(x, y, kept, slot) if triton else reference.merge_tokens(x, y, kept, slot)


def softmax_kl(teacher: Tensor, student: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`KL(softmax(teacher) || softmax(student))` of every row, in nats, computed in float32.

    Args:
        teacher: `[N, D]` finite float32, float16 or bfloat16 (float64 too on the torch backend); best with a last stride of 1.
        student: `[N, D]`, dtype of teacher.

    Returns:
        `[N]` float32 (float64 for float64). Differentiable in both; only the gradients that are needed are computed.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> softmax_kl(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
        tensor([0.1201, 0.0000])
    """
    triton = _use_triton(backend, teacher)
    _expect_dim("teacher", teacher, "N, D")
    _expect_float("teacher", teacher, triton)
    _expect_shape("student", student, teacher.shape, "like teacher")
    _expect_dtype("student", student, (teacher.dtype,))
    _expect_device("teacher", teacher, student=student)
    return divergence.softmax_kl(teacher, student) if triton else reference.softmax_kl(teacher, student)


def token_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    overwrite_logits: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of every row, in nats, computed in float32: `logsumexp(logits[n]) - logits[n, labels[n]]`.

    Args:
        logits: `[N, V]` float32, float16 or bfloat16 (float64 too on the torch backend); best with a last stride of 1.
        labels: `[N]` int64 or int32, each in `[0, V)` or `ignore_index`. The kernel's loss for any other label is NaN.
        overwrite_logits: let the Triton backward write the gradient over the logits instead of into new memory. For a caller
            who owns the logits and uses them nowhere else: afterwards they hold the gradient, and a second backward through
            them raises RuntimeError. The gradient is the same. `torch.compile` manages its own memory and ignores this.

    Returns:
        `[N]` float32 (float64 for float64), 0 where the label is `ignore_index`. Differentiable in logits.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> token_cross_entropy(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([1, -100]))
        tensor([0.6931, 0.0000])
    """
    triton = _use_triton(backend, logits)
    _expect_dim("logits", logits, "N, V")
    _expect_float("logits", logits, triton)
    _expect_shape("labels", labels, logits.shape[:1], "one per row of logits")
    _expect_dtype("labels", labels, INDEX_DTYPES)
    _expect_device("logits", logits, labels=labels)
    if not triton:
        return reference.token_cross_entropy(logits, labels, ignore_index)
    if overwrite_logits and logits.requires_grad and logits.is_leaf:
        raise ValueError("overwrite_logits=True would overwrite a leaf tensor, a parameter perhaps: pass computed logits")
    overwrite = overwrite_logits and not torch.compiler.is_compiling()
    return cross_entropy.token_cross_entropy(logits, labels, ignore_index, overwrite)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`gelu(x @ weight.T + bias)`, with the exact GELU. The Triton backward of GELU also sums the gradient of the bias.

    Args:
        x: `[..., D]` float32, float16 or bfloat16 (float64 too on the torch backend).
        weight: `[N, D]`, as in `torch.nn.Linear`.
        bias: `[N]`.

    Returns:
        `[..., N]`, dtype of x; under torch.autocast, autocast's. Differentiable in all three.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> linear_gelu(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([-3.0]))
        tensor([[0.]])
    """
    triton = _use_triton(backend, x)
    _expect_float("x", x, triton)
    _expect_dim("weight", weight, "N, D")
    if x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}] to match weight, got {list(x.shape)}")
    _expect_shape("bias", bias, weight.shape[:1], "one per row of weight")
    _expect_device("x", x, weight=weight, bias=bias)
    return backward.linear_gelu(x, weight, bias) if triton else reference.linear_gelu(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """LayerNorm of the last dimension. The Triton backward reads x once, and sums the gradients of weight and bias with it.

    Args:
        x: `[..., D]` float32, float16 or bfloat16 (float64 too on the torch backend). Triton: D up to 4096.
        weight, bias: `[D]`.
        eps: what is added to the variance.

    Returns:
        Shape and dtype of x. Differentiable in all three.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2), eps=0.0)
        tensor([[-1.,  1.]])
    """
    triton = _use_triton(backend, x)
    _expect_float("x", x, triton)
    if x.dim() < 2:
        raise ValueError(f"x must be [..., D], got {list(x.shape)}")
    if triton and x.shape[-1] > backward.MAX_BLOCK_D:
        raise ValueError(f"x has rows of {x.shape[-1]}, the kernel takes up to {backward.MAX_BLOCK_D}: use backend='torch'")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _expect_shape(name, parameter, x.shape[-1:], "like the last dimension of x")
    _expect_device("x", x, weight=weight, bias=bias)
    return backward.layer_norm(x, weight, bias, eps) if triton else reference.layer_norm(x, weight, bias, eps)


def _expect_stats(stats: Tensor, vocabulary: int | None = None) -> None:
    if stats.dim() != 2 or stats.shape[0] != 2 or stats.shape[1] != (vocabulary or stats.shape[1]):
        raise ValueError(f"stats must be [2, {vocabulary or 'V'}], got {list(stats.shape)}")
    _expect_dtype("stats", stats, (torch.float64,))
    if not stats.is_contiguous():
        raise ValueError("stats must be contiguous, as it is updated in place: pass a contiguous tensor")


def record_losses(
    stats: Tensor, labels: Tensor, losses: Tensor, ignore_index: int = -100, *, backend: Backend = "auto"
) -> None:
    """Add losses to the (sum, count) of their labels, in place: `stats[0, labels[n]] += losses[n]; stats[1, labels[n]] += 1`.

    Each loss is first rounded to a multiple of 2**-20. Sums of such numbers below 2**33 are exact in float64, so the result
    does not depend on the order of the additions, i.e. on the device's scheduling, micro-batches or ranks.

    Args:
        stats: `[2, V]` float64, contiguous, updated in place.
        labels: `[N]` int64 or int32, each in `[0, V)` or `ignore_index`.
        losses: `[N]` floating point; no gradient flows to it. Non-finite losses are skipped.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Example:
        >>> stats = torch.zeros(2, 3, dtype=torch.float64)
        >>> record_losses(stats, torch.tensor([2, 0, 2, -100]), torch.tensor([1.0, 5.0, 3.0, 9.0]))
        >>> stats
        tensor([[5., 0., 4.],
                [1., 0., 2.]], dtype=torch.float64)
    """
    triton = _use_triton(backend, stats)
    _expect_stats(stats)
    _expect_dim("labels", labels, "N")
    _expect_dtype("labels", labels, INDEX_DTYPES)
    _expect_shape("losses", losses, labels.shape, "like labels")
    _expect_float("losses", losses, triton)
    _expect_device("stats", stats, labels=labels, losses=losses)
    if triton:
        importance.record_losses(stats, labels, losses.detach(), ignore_index)
    else:
        reference.record_losses(stats, labels, losses, ignore_index)


def update_scores(scores: Tensor, stats: Tensor, decay: float, *, backend: Backend = "auto") -> None:
    """Move each score towards its mean loss, in place: `score = decay * score + (1 - decay) * sum / count` where count > 0.

    The arithmetic is float64 and rounded once. `stats` does not change: the caller zeroes it.

    Args:
        scores: `[V]` float32, contiguous, updated in place.
        stats: `[2, V]` float64, contiguous: sum and count of the losses of each vocabulary id.
        decay: from 0 (the score becomes the mean) to 1 (no change).

    Raises:
        ValueError: a shape, dtype or device is wrong, or `decay` is out of range.

    Example:
        >>> scores, stats = torch.tensor([10.0, 10.0]), torch.tensor([[12.0, 0.0], [2.0, 0.0]]).double()
        >>> update_scores(scores, stats, decay=0.5)
        >>> scores
        tensor([ 8., 10.])
    """
    triton = _use_triton(backend, scores)
    _expect_dim("scores", scores, "V")
    _expect_dtype("scores", scores, (torch.float32,))
    if not scores.is_contiguous():
        raise ValueError("scores must be contiguous, as it is updated in place: pass a contiguous tensor")
    _expect_stats(stats, scores.shape[0])
    _expect_device("scores", scores, stats=stats)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
    if triton:
        importance.update_scores(scores, stats, decay)
    else:
        reference.update_scores(scores, stats, decay)
