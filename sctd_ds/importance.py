"""Which tokens matter: a score per vocabulary id, learned from the masked-LM loss (or one of two controls).

A policy collects evidence micro-batch by micro-batch (`record`), on the device and without waiting for it, and turns it into
new scores once per applied optimizer step (`update`), the same on every rank. A step that was skipped is forgotten
(`discard`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sctd_kernels
import torch
import torch.distributed as dist
from torch import Tensor

from sctd_ds.config import ConfigError, ScTDConfig

START = 10.0
"""Score of an id that was never a label: above any plausible loss, so unknown tokens are kept."""
PINNED = 1e4
"""Score of `keep_token_ids`, and of no other id: no loss and no rarity comes near it."""


class Importance:
    """Running masked-LM loss per vocabulary id: the default policy, and the base of the others.

    scores: [V] fp32, always (a running mean with decay 0.995 stalls in bf16). It lives outside the module, so no cast of
    the model reaches it, and it follows the data's device.
    """

    def __init__(self, vocabulary: int, config: ScTDConfig, keep_token_ids: Sequence[int]) -> None:
        wrong = [i for i in keep_token_ids if not 0 <= i < vocabulary]
        if wrong:
            raise ConfigError(f"sctd.keep_token_ids has {wrong}, but the model's vocabulary has ids 0 .. {vocabulary - 1}")
        self.decay = config.decay
        self.scores = torch.full((vocabulary,), START, dtype=torch.float32)
        self.keep_token_ids = torch.tensor(list(keep_token_ids), dtype=torch.long)
        # Row 0 sums losses, row 1 counts them. record_losses makes fp64 sums exact: no order of additions can change them.
        self._stats = torch.zeros(2, vocabulary, dtype=torch.float64)
        self._pin()

    def to(self, device: torch.device) -> None:
        """Move the table to `device`; costs nothing when it is there already."""
        if self.scores.device != device:
            self.scores = self.scores.to(device)
            self.keep_token_ids = self.keep_token_ids.to(device)
            self._stats = self._stats.to(device)

    def selection(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Table and ids for `sctd_kernels.select_tokens`, from the corrupted ids [B, S]."""
        return self.scores, input_ids

    def record(self, labels: Tensor, losses: Tensor, ignore_index: int) -> None:
        """Add one micro-batch: labels [N] and their fp32 losses [N]; ignored labels and non-finite losses add nothing."""
        sctd_kernels.record_losses(self._stats, labels, losses, ignore_index)

    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """Finish an applied optimizer step: one all-reduce of 2V numbers, then the running mean."""
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(self._stats, group=group)
        self._learn()
        self._pin()
        self._stats.zero_()

    def discard(self) -> None:
        """Forget what was recorded since the last update: the step was skipped."""
        self._stats.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The table, on the CPU."""
        return {"scores": self.scores.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the vocabulary must be the same.

        The pins are those of this policy: an id that only the stored table pinned starts at START, as nothing is known of it.
        """
        if state["scores"].shape != self.scores.shape:
            raise ConfigError(
                f"the checkpoint's importance table has {len(state['scores'])} ids, the model {len(self.scores)}: "
                "it was trained with another vocabulary"
            )
        self.scores.copy_(state["scores"])
        self.scores.masked_fill_(self.scores == PINNED, START)
        self._pin()
        self._stats.zero_()

    def _learn(self) -> None:
        sctd_kernels.update_scores(self.scores, self._stats, self.decay)

    def _pin(self) -> None:
        self.scores.index_fill_(0, self.keep_token_ids, PINNED)


class FrequencyImportance(Importance):
    """Rare labels are important: score = log((n + 1) / (count + 1)) over the labels seen so far."""

    def __init__(self, vocabulary: int, config: ScTDConfig, keep_token_ids: Sequence[int]) -> None:
        super().__init__(vocabulary, config, keep_token_ids)
        self._counts = torch.zeros(vocabulary, dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._counts = self._counts.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "counts": self._counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts.copy_(state["counts"])

    def _learn(self) -> None:
        self._counts += self._stats[1]
        self.scores.copy_(torch.log((self._counts.sum() + 1) / (self._counts + 1)))


class RandomImportance(Importance):
    """No importance: positions are dropped at random (kept ids stay pinned). The control every comparison needs."""

    def selection(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        # One random score per position: the position's number plays the id.
        random = torch.rand(input_ids.numel(), dtype=torch.float32, device=input_ids.device)
        pinned = torch.isin(input_ids.flatten(), self.keep_token_ids)
        positions = torch.arange(input_ids.numel(), device=input_ids.device)
        return torch.where(pinned, PINNED, random), positions.view_as(input_ids)

    def record(self, labels: Tensor, losses: Tensor, ignore_index: int) -> None:
        """Nothing to learn."""

    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """Nothing to learn."""


POLICIES: dict[str, Callable[[int, ScTDConfig, Sequence[int]], Importance]] = {
    "loss": Importance,
    "frequency": FrequencyImportance,
    "random": RandomImportance,
}
