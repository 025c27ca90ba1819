"""What is learned: masked-LM cross-entropy on one or both passes, and the KL between them (Eq. 1-4 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import sctd_kernels
import torch
from torch import Tensor

from sctd_ds.adapters import Batch
from sctd_ds.encoder import Pass, ScTD, Selection, take_rows


@dataclass
class Labelled:
    """The labelled tokens of a micro-batch in M slots per row: positions [B, M] int32 and targets [B, M], unused slots ignored."""

    positions: Tensor
    slot: Tensor
    targets: Tensor
    count: Tensor
    """Number of labelled tokens, fp32, at least 1."""
    fits: Tensor
    """Bool: no row has more than M labels."""


def compute(state: ScTD, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of one micro-batch in the state's mode, and its detached parts.

    Drop step: CE(dropped). Align step: 1/2 CE(dropped) + 1/2 CE(full) + kl_weight (KL_l + KL_{l-1}), each row by itself
    when the schedule is "spread". Dense: CE(full). The dropped pass's token losses go to the importance table.
    Parts: "loss", "ce_drop", "ce_full", "kl_last", "kl_previous" where the mode has them.
    """
    config, mode = state.config, state.mode
    labelled = locate_labels(batch.labels, state.adapter.ignore_index, config.labels_per_row)
    dropped, full, selection, rows = state.passes(batch, mode)
    n = labelled.count
    parts: dict[str, Tensor] = {}

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
            kl = config.kl_weight * (kl_last + kl_previous) / scale
            if config.objective == "released":
                loss = ce_drop + kl
            else:
                part = Labelled(labelled.positions[aligned], labelled.slot[aligned], labelled.targets[aligned],
                                labelled.count, labelled.fits)  # fmt: skip
                full_sum = token_losses(state, full, part).sum()
                # Rows that are not aligned keep their whole dropped loss; aligned ones share it with the full pass.
                loss = (losses.sum() - 0.5 * losses[aligned].sum() + 0.5 * full_sum) / n + kl
                part_count = (part.targets != state.adapter.ignore_index).sum().clamp(min=1)
                parts["ce_full"] = full_sum / part_count
            parts["kl_last"], parts["kl_previous"] = kl_last / len(rows), kl_previous / len(rows)
    loss = torch.where(labelled.fits, loss, torch.nan)
    parts["loss"] = loss
    return loss, {name: value.detach().float() for name, value in parts.items()}


def locate_labels(labels: Tensor, ignore_index: int, slots: int | None) -> Labelled:
    """Find the labelled tokens of [B, S] labels without waiting for the device, given the slots per row.

    slots None: the largest count in the micro-batch, which is read back from the device.
    """
    absent = labels == ignore_index
    counts = (~absent).sum(dim=1)
    slots = min(slots or max(1, int(counts.max())), labels.shape[1])
    # A stable sort of one bit brings labelled positions to the front, in order.
    order = torch.sort(absent.to(torch.uint8), dim=1, stable=True).indices
    positions = order[:, :slots]
    place = torch.arange(slots, device=labels.device).expand_as(positions)
    slot = torch.full_like(labels, -1).scatter(1, positions, place)
    return Labelled(
        positions.to(torch.int32),
        slot.to(torch.int32),
        labels.gather(1, positions),
        counts.sum().clamp(min=1).float(),
        counts.max() <= slots,
    )


def token_losses(state: ScTD, states: Pass, labelled: Labelled) -> Tensor:
    """Cross-entropy of each labelled slot, [B, M]; 0 in unused slots. The head runs on these rows only."""
    rows = sctd_kernels.gather_tokens(states.last, labelled.positions, labelled.slot)
    logits = state.adapter.head(rows).flatten(0, 1)
    losses = sctd_kernels.token_cross_entropy(logits, labelled.targets.flatten(), state.adapter.ignore_index)
    return losses.view(labelled.targets.shape)


def align(state: ScTD, student: Pass, teacher: Pass, selection: Selection, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(softmax(full) || softmax(dropped)) over the hidden units, per sequence: at layer l [B] and at layer l-1 [B].

    align_on "cls": of the first state. "mean": of the mean over the positions that the dropped pass has at that layer
    (all at l, the kept ones at l-1), padding left out. "kept": the mean over the kept positions of their KLs.
    """
    kept, slot = selection.kept, selection.slot

    def at_kept(x: Tensor) -> Tensor:
        return sctd_kernels.gather_tokens(x, kept, slot)

    on = state.config.align_on
    if on == "cls":
        pairs = [(teacher.last[:, 0], student.last[:, 0]), (teacher.previous[:, 0], student.previous[:, 0])]
        return _kl(state, *pairs[0]), _kl(state, *pairs[1])
    if on == "mean":
        last = _kl(state, _mean(teacher.last, mask), _mean(student.last, mask))
        previous = _kl(state, _mean(at_kept(teacher.previous), selection.mask), _mean(student.previous, selection.mask))
        return last, previous
    per_layer = []
    for full, dropped in (
        (at_kept(teacher.last), at_kept(student.last)),
        (at_kept(teacher.previous), student.previous),
    ):
        kl = _kl(state, full.flatten(0, 1), dropped.flatten(0, 1)).view(kept.shape)
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
