"""Where the labelled tokens of a micro-batch are, and so where its last layer and its head have work to do.

Legend: B rows, S tokens, M slots for labelled tokens in a row, R positions of a row that the loss reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sctd_ds.method.selection import Selection


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens of a micro-batch, in M slots per row."""

    tokens: Selection
    """Their positions [B, M] among the last layer's outputs: those at `outputs`, or all S."""
    targets: Tensor
    """[B, M], the ignored label in unused slots."""
    count: Tensor
    """Number of labelled tokens, fp32, at least 1."""
    fits: Tensor
    """Bool: no row has more than M labels."""
    outputs: Selection | None = None
    """Positions [B, R] at which the last layer runs; None: at all."""

    def take_rows(self, rows: range) -> Labelled:
        """The same for some rows of the micro-batch; `count` and `fits` stay those of all rows."""
        outputs = None if self.outputs is None else self.outputs.take_rows(rows)
        targets = self.targets[rows.start :: rows.step]
        return replace(self, tokens=self.tokens.take_rows(rows), targets=targets, outputs=outputs)

    def narrowed(self) -> Labelled:
        """With the last layer run only where the loss reads it: at [CLS], which comes first, and at the labelled tokens.

        R = M + 1. Where that is no fewer than S, the last layer runs at all tokens.
        """
        slots, length = self.tokens.positions.shape[1] + 1, self.tokens.slot.shape[1]
        if slots >= length:
            return self
        unread = self.tokens.slot < 0
        unread[:, 0] = False
        outputs = _first(unread, slots)
        positions = outputs.slot.gather(1, self.tokens.positions.long())
        return replace(self, tokens=Selection(positions, _inverse(positions, slots)), outputs=outputs)


def locate_labels(labels: Tensor, ignore_index: int, slots: int | None, vocabulary: int) -> Labelled:
    """Find the labelled tokens of [B, S] labels. Given the slots per row, this does not wait for the device.

    slots None: the largest count in the micro-batch, which is read back from the device, and with it whether the labels
    make sense. Raises ValueError for ids outside the vocabulary, and where every token is labelled.
    """
    absent = labels == ignore_index
    counts = (~absent).sum(dim=1)
    if slots is None:
        ids = labels.masked_fill(absent, 0)
        slots, fewest, low, high = torch.stack([counts.max(), counts.min(), ids.min(), ids.max()]).tolist()
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"labels hold {low if low < 0 else high}, but ids go from 0 to {vocabulary - 1} and this model ignores "
                f"{ignore_index}: put {ignore_index} where nothing is predicted"
            )
        if fewest == labels.shape[1]:
            raise ValueError(
                f"every token has a label: this model ignores the label {ignore_index}, so put it where nothing is predicted"
            )
    slots = min(max(1, slots), labels.shape[1])
    tokens = _first(absent, slots)
    return Labelled(
        tokens,
        targets=labels.gather(1, tokens.positions.long()),
        count=counts.sum().clamp(min=1).float(),
        fits=counts.max() <= slots,
    )


def _first(unwanted: Tensor, count: int) -> Selection:
    """`count` positions of each row: wanted positions first, then unwanted ones, each in order. unwanted: [B, S] bool."""
    # A stable sort of one bit brings the wanted positions to the front.
    positions = torch.sort(unwanted.to(torch.uint8), dim=1, stable=True).indices[:, :count].to(torch.int32)
    return Selection(positions, _inverse(positions, unwanted.shape[1]))


def _inverse(positions: Tensor, length: int) -> Tensor:
    """[B, length] int32: the index of each position in `positions` [B, M], or -1."""
    index = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32).expand_as(positions)
    empty = torch.full((len(positions), length), -1, device=positions.device, dtype=torch.int32)
    return empty.scatter(1, positions.long(), index)
