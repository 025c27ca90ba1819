"""Where the labelled tokens of a micro-batch are, and so where its last layer and its head have work to do.

Legend: B rows, S tokens, M slots for labelled tokens in a row, R positions of a row that the loss reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Positions of each row: at [B, R] int32; slot [B, S] int32, the place in `at` or -1."""

    at: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens of a micro-batch in M slots per row: positions [B, M] int32, targets [B, M], ignored where unused.

    Positions count among the last layer's outputs: those at `outputs`, or all S.
    """

    positions: Tensor
    slot: Tensor
    """[B, S or R] int32: the place in `positions` or -1."""
    targets: Tensor
    count: Tensor
    """Number of labelled tokens, fp32, at least 1."""
    fits: Tensor
    """Bool: no row has more than M labels."""
    outputs: Places | None = None
    """Where the last layer is run; None: everywhere."""

    def take_rows(self, rows: range) -> Labelled:
        """The same for some rows of the micro-batch; `count` and `fits` stay those of all."""
        part = slice(rows.start, None, rows.step)
        outputs = None if self.outputs is None else Places(self.outputs.at[part], self.outputs.slot[part])
        return replace(self, positions=self.positions[part], slot=self.slot[part], targets=self.targets[part], outputs=outputs)

    def narrowed(self) -> Labelled:
        """With the last layer run only where the loss reads it: at [CLS], which comes first, and at the labelled tokens.

        R = M + 1. Where that would be no fewer than S, all stay.
        """
        slots, length = self.positions.shape[1] + 1, self.slot.shape[1]
        if slots >= length:
            return self
        unread = self.slot < 0
        unread[:, 0] = False
        outputs = _first(unread, slots)
        positions = outputs.slot.gather(1, self.positions.long())
        return replace(self, positions=positions, slot=_inverse(positions, slots), outputs=outputs)


def locate_labels(labels: Tensor, ignore_index: int, slots: int | None, vocabulary: int) -> Labelled:
    """Find the labelled tokens of [B, S] labels without waiting for the device, given the slots per row.

    slots None: the largest count in the micro-batch, which is read back from the device, and with it whether the labels
    make sense: ValueError for ids outside the vocabulary, and where every token is labelled.
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
    places = _first(absent, slots)
    return Labelled(
        places.at,
        places.slot,
        labels.gather(1, places.at.long()),
        counts.sum().clamp(min=1).float(),
        counts.max() <= slots,
    )


def _first(passed_over: Tensor, count: int) -> Places:
    """`count` positions of each row, in order: those not passed over, then others. passed_over: [B, S] bool."""
    # A stable sort of one bit brings the wanted positions to the front.
    at = torch.sort(passed_over.to(torch.uint8), dim=1, stable=True).indices[:, :count].to(torch.int32)
    return Places(at, _inverse(at, passed_over.shape[1]))


def _inverse(positions: Tensor, length: int) -> Tensor:
    """[B, length] int32: where in `positions` [B, M] each position stands, or -1."""
    place = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32).expand_as(positions)
    empty = torch.full((len(positions), length), -1, device=positions.device, dtype=torch.int32)
    return empty.scatter(1, positions.long(), place)
