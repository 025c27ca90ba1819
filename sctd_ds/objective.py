"""What is learned: masked-LM cross-entropy on one or both passes, and the KL between them (Eq. 1-4 of the paper)."""

from __future__ import annotations

import sctd_kernels
import torch
from torch import Tensor

from sctd_ds.adapters import Batch
from sctd_ds.encoder import Pass, Passes, ScTD, Selection, take_rows
from sctd_ds.labels import Labelled

PARTS = ("ce_drop", "ce_full", "kl_last", "kl_previous", "ce_sentence", "loss")
"""Names of the objective's parts, see `evaluate`."""


def compute(state: ScTD, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The objective of one micro-batch in the state's mode; returns what `evaluate` does."""
    return evaluate(state, batch, state.passes(batch, state.mode))


def evaluate(state: ScTD, batch: Batch, passes: Passes) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The objective given the passes, its detached parts, and the first token's finished state [B, 1, d].

    Drop step: CE(dropped). Align step: 1/2 CE(dropped) + 1/2 CE(full) + kl_weight (KL_l + KL_{l-1}), each row by itself
    when the schedule is "spread". Dense: CE(full). The dropped pass's token losses go to the importance table. A model's
    sentence-level loss is added once, with weight 1, from the dropped pass where there is one.
    Of the parts, those in PARTS that the mode and the model have.
    """
    config, adapter, labelled = state.config, state.adapter, passes.labelled
    dropped, full, selection, rows = passes.dropped, passes.full, passes.selection, passes.rows
    n = labelled.count
    parts: dict[str, Tensor] = {}

    learned = dropped or full
    if dropped is None:
        assert full is not None
        loss = token_losses(state, full, labelled).sum() / n
        parts["ce_full"] = loss
    else:
        losses = token_losses(state, dropped, labelled)
        state.importance.record(labelled.targets.flatten(), losses.detach().flatten(), state.adapter.ignore_index)
        ce_drop = losses.sum() / n
        parts["ce_drop"] = loss = ce_drop
        if full is not None:
            assert selection is not None
            aligned = slice(rows.start, None, rows.step)
            student = Pass(dropped.last[aligned], dropped.previous[aligned])
            chosen = Selection(selection.kept[aligned], selection.slot[aligned],
                               None if selection.mask is None else selection.mask[aligned])  # fmt: skip
            mask = take_rows(batch, rows).attention_mask
            kl_last, kl_previous = (kl.sum() for kl in align(state, student, full, chosen, mask))
            scale = n if config.kl_reduction == "labels" else float(len(batch.input_ids))
            learned_kl = {"both": kl_last + kl_previous, "last": kl_last, "previous": kl_previous}[config.kl_layers]
            kl = config.kl_weight * learned_kl / scale
            if config.objective == "released":
                loss = ce_drop + kl
            else:
                part = labelled.take_rows(rows)
                full_sum = token_losses(state, full, part).sum()
                # Rows that are not aligned keep their whole dropped loss; aligned ones share it with the full pass.
                loss = (losses.sum() - 0.5 * losses[aligned].sum() + 0.5 * full_sum) / n + kl
                part_count = (part.targets != state.adapter.ignore_index).sum().clamp(min=1)
                parts["ce_full"] = full_sum / part_count
            parts["kl_last"], parts["kl_previous"] = kl_last / len(rows), kl_previous / len(rows)
    assert learned is not None
    first = adapter.final_norm(learned.last[:, :1])
    sentence = adapter.sentence_loss(first, batch)
    if sentence is not None:
        parts["ce_sentence"] = sentence
        loss = loss + sentence
    loss = torch.where(labelled.fits, loss, torch.nan)
    parts["loss"] = loss
    if batch.items is not None:
        loss = loss * n / batch.items
    return loss, {name: value.detach().float() for name, value in parts.items()}, first


def token_losses(state: ScTD, states: Pass, labelled: Labelled) -> Tensor:
    """Cross-entropy of each labelled slot, [B, M]; 0 in unused slots. The head runs on these rows only."""
    rows = sctd_kernels.gather_tokens(states.last, labelled.positions, labelled.slot)
    logits = state.adapter.head(state.adapter.final_norm(rows)).flatten(0, 1)
    losses = sctd_kernels.token_cross_entropy(logits, labelled.targets.flatten(), state.adapter.ignore_index)
    return losses.view(labelled.targets.shape)


def align(state: ScTD, student: Pass, teacher: Pass, selection: Selection, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(softmax(full) || softmax(dropped)) over the hidden units, per sequence: at layer l [B] and at layer l-1 [B].

    align_on "cls": of the first state. "mean": of the mean over the positions that the dropped pass has at that layer
    (all at l, the kept ones at l-1), padding left out. "kept": the mean over the kept positions of their KLs.
    A pre-LN encoder's states are compared as its final LayerNorm leaves them, at both layers.
    """
    kept, slot, norm = selection.kept, selection.slot, state.adapter.final_norm

    def at_kept(x: Tensor) -> Tensor:
        return sctd_kernels.gather_tokens(x, kept, slot)

    on = state.config.align_on
    if on == "cls":
        last = _kl(state, norm(teacher.last[:, 0]), norm(student.last[:, 0]))
        return last, _kl(state, norm(teacher.previous[:, 0]), norm(student.previous[:, 0]))
    if on == "mean":
        last = _kl(state, _mean(norm(teacher.last), mask), _mean(norm(student.last), mask))
        kept_mask, full = selection.mask, norm(at_kept(teacher.previous))
        return last, _kl(state, _mean(full, kept_mask), _mean(norm(student.previous), kept_mask))
    per_layer = []
    for full, dropped in (
        (at_kept(teacher.last), at_kept(student.last)),
        (at_kept(teacher.previous), student.previous),
    ):
        kl = _kl(state, norm(full).flatten(0, 1), norm(dropped).flatten(0, 1)).view(kept.shape)
        per_layer.append(_mean(kl[..., None], selection.mask).squeeze(-1))
    return per_layer[0], per_layer[1]


def _kl(state: ScTD, teacher: Tensor, student: Tensor) -> Tensor:
    if state.config.objective != "released":
        teacher = teacher.detach()
    return sctd_kernels.softmax_kl(teacher, student)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over dimension 1 of [B, T, d], in fp32 at least, leaving out positions where the mask [B, T] is 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.mean(dim=1)
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
