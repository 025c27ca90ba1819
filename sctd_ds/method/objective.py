"""What is learned: masked-LM cross-entropy on one or both passes, and the KL between them (Eq. 1-4 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import sctd_kernels
import torch
from torch import Tensor

from sctd_ds.method.labels import Labelled
from sctd_ds.method.passes import Pass, Streams
from sctd_ds.method.state import ScTD

PARTS = ("ce_drop", "ce_full", "kl_last", "kl_previous", "ce_sentence", "loss")
"""Names of the objective's parts: cross-entropies per labelled token, KL terms per row, and the sum that is learned."""

Terms = tuple[Tensor, dict[str, Tensor]]
"""A loss, and its parts by name."""


@dataclass(frozen=True)
class Objective:
    """The loss of one micro-batch, its detached fp32 parts (those in PARTS that it has), and the first token's finished
    state [B, 1, d], from which a model makes its sentence-level outputs."""

    loss: Tensor
    parts: dict[str, Tensor]
    first: Tensor


def compute(state: ScTD, streams: Streams) -> Objective:
    """The objective of one micro-batch. The importance table gets the token losses of the dropped pass, or of a dense step.

    A sentence-level loss of the model is added once, with weight 1, from the dropped pass where there is one. The loss is
    NaN where a row has more labels than `labels_per_row`.
    """
    labelled, learned = streams.labelled, streams.dropped_pass or streams.full_pass
    assert labelled is not None and learned is not None
    if streams.dropped_pass is None:
        loss, parts = _dense(state, streams, labelled)
    elif streams.full_pass is None:
        loss, parts = _drop(state, streams, labelled)
    else:
        loss, parts = _align(state, streams, labelled)

    first = state.adapter.final_norm(learned.last[:, :1])
    sentence = state.adapter.sentence_loss(first, streams.batch)
    if sentence is not None:
        parts["ce_sentence"] = sentence
        loss = loss + sentence
    loss = torch.where(labelled.fits, loss, torch.nan)
    parts["loss"] = loss
    if streams.batch.items is not None:  # the caller divides by the labels of the whole step
        loss = loss * labelled.count / streams.batch.items
    return Objective(loss, {name: value.detach().float() for name, value in parts.items()}, first)


def _dense(state: ScTD, streams: Streams, labelled: Labelled) -> Terms:
    """CE(full). In a run that drops tokens at other times, its token losses go to the importance table."""
    assert streams.full_pass is not None
    losses = token_losses(state, streams.full_pass, labelled)
    if state.plan.drops:
        _record(state, labelled, losses)
    loss = losses.sum() / labelled.count
    return loss, {"ce_full": loss}


def _drop(state: ScTD, streams: Streams, labelled: Labelled) -> Terms:
    """CE(dropped)."""
    loss = _dropped_losses(state, streams, labelled).sum() / labelled.count
    return loss, {"ce_drop": loss}


def _align(state: ScTD, streams: Streams, labelled: Labelled) -> Terms:
    """1/2 CE(dropped) + 1/2 CE(full) + kl_weight (KL_l + KL_{l-1}) on the aligned rows (Eq. 4), CE(dropped) on the others.

    KL_i = KL(softmax(full) || softmax(dropped)) over the hidden units of [CLS], summed over rows and divided by the number
    of labelled tokens (Eq. 1-3).
    """
    config, n, rows = state.config, labelled.count, streams.rows
    aligned = slice(rows.start, None, rows.step)
    student, teacher = streams.dropped_pass, streams.full_pass
    assert student is not None and teacher is not None
    dropped = _dropped_losses(state, streams, labelled)
    kl_last = _kl(state, teacher.last[:, 0], student.last[aligned, 0]).sum()
    kl_previous = _kl(state, teacher.previous[:, 0], student.previous[aligned, 0]).sum()
    learned_kl = {"both": kl_last + kl_previous, "last": kl_last, "previous": kl_previous}[config.kl_layers]
    kl = config.kl_weight * learned_kl / n
    parts = {"ce_drop": dropped.sum() / n, "kl_last": kl_last / len(rows), "kl_previous": kl_previous / len(rows)}
    if config.objective == "released":
        return parts["ce_drop"] + kl, parts

    part = labelled.take_rows(rows)
    full_sum = token_losses(state, teacher, part).sum()
    parts["ce_full"] = full_sum / (part.targets != state.adapter.ignore_index).sum().clamp(min=1)
    return (dropped.sum() - 0.5 * dropped[aligned].sum() + 0.5 * full_sum) / n + kl, parts


def _dropped_losses(state: ScTD, streams: Streams, labelled: Labelled) -> Tensor:
    """Token losses of the dropped pass [B, M], which go to the importance table."""
    assert streams.dropped_pass is not None
    losses = token_losses(state, streams.dropped_pass, labelled)
    _record(state, labelled, losses)
    return losses


def _record(state: ScTD, labelled: Labelled, losses: Tensor) -> None:
    """Let the importance table learn from token losses [B, M]."""
    state.importance.record(labelled.targets.flatten(), losses.detach().flatten(), state.adapter.ignore_index)


def token_losses(state: ScTD, states: Pass, labelled: Labelled) -> Tensor:
    """Cross-entropy of each labelled slot, [B, M]; 0 in unused slots. The head runs on these tokens only."""
    adapter = state.adapter
    logits = adapter.head(adapter.final_norm(labelled.tokens.gather(states.last))).flatten(0, 1)
    # The logits are the largest tensor of a step, and nothing else reads them: their gradient takes their memory.
    losses = sctd_kernels.token_cross_entropy(logits, labelled.targets.flatten(), adapter.ignore_index, overwrite_logits=True)
    return losses.view(labelled.targets.shape)


def _kl(state: ScTD, teacher: Tensor, student: Tensor) -> Tensor:
    """KL between states [R, d] of the full and of the dropped pass, per row. A pre-LN encoder's are normalised first."""
    norm = state.adapter.final_norm
    teacher = norm(teacher)
    if state.config.objective != "released":
        teacher = teacher.detach()
    return sctd_kernels.softmax_kl(teacher, norm(student))
