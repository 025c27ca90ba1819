"""The reference of every kernel in torch: specification, test oracle, CPU path and benchmark baseline.

Each function defines in a few lines of torch what the Triton kernel of the same name computes. None makes the host wait for
the device (no `.item()`, no `nonzero`, no boolean-mask indexing), and none checks its arguments: `sctd_kernels.api` does.

Shapes: B sequences, S tokens, K kept tokens, D hidden size, V vocabulary, N rows. Half precision is widened to
float32 before any arithmetic; float64 stays float64, so that `torch.autograd.gradcheck` can check the gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_RESOLUTION = 2.0**-20
"""Recorded losses are rounded to multiples of this, so their float64 sums are exact up to 2**33, in any order."""


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def select_tokens(scores: Tensor, input_ids: Tensor, keep: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    inf = float("inf")
    score = scores[input_ids.long()].nan_to_num(nan=-inf, posinf=inf, neginf=-inf)  # [B, S]
    if attention_mask is not None:
        score = score.masked_fill(attention_mask == 0, -inf)
    score[:, 0] = inf
    best = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
    kept = best.sort(dim=1).values
    slot = torch.full_like(input_ids, -1, dtype=torch.int32)
    slot.scatter_(1, kept, torch.arange(keep, dtype=torch.int32, device=slot.device).expand_as(kept))
    return kept.int(), slot


def gather_tokens(x: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    return x.gather(1, kept.long()[..., None].expand(-1, -1, x.shape[2]))


def merge_tokens(x: Tensor, y: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    return x.scatter(1, kept.long()[..., None].expand_as(y), y)


def softmax_kl(teacher: Tensor, student: Tensor) -> Tensor:
    log_p = F.log_softmax(_widen(teacher), dim=-1)
    log_q = F.log_softmax(_widen(student), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    return F.cross_entropy(_widen(logits), labels.long(), ignore_index=ignore_index, reduction="none")


def record_losses(stats: Tensor, labels: Tensor, losses: Tensor, ignore_index: int = -100) -> None:
    valid = (labels != ignore_index) & losses.isfinite()
    rounded = (losses.detach().double() / LOSS_RESOLUTION).round() * LOSS_RESOLUTION
    stats.index_add_(1, labels.long() * valid, torch.stack([rounded.where(valid, 0.0), valid.double()]))


def update_scores(scores: Tensor, stats: Tensor, decay: float) -> None:
    total, count = stats
    updated = decay * scores.double() + (1 - decay) * total / count.clamp(min=1)
    scores.copy_(updated.float().where(count > 0, scores))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
