"""Which tokens are kept: importance policies, and the positions they choose.

A policy collects evidence micro-batch by micro-batch (`record`), on the device and without waiting for it, and turns it into
new scores once per applied optimizer step (`update`), the same on every rank. It forgets a step that was skipped (`discard`).

Legend: B rows, S tokens, K selected tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sctd_kernels
import torch
import torch.distributed as dist
from torch import Tensor

from sctd_ds.config import ConfigError, ScTDConfig

START = 10.0
"""Score of an id that was never a label: above any plausible loss, so unknown tokens are kept."""
PINNED = 1e4
"""Score of `keep_token_ids`, and of no other id: no loss and no rarity comes near it."""


@dataclass(frozen=True)
class Selection:
    """Positions chosen in each row: positions [B, K] int32; slot [B, S] int32, the index into `positions` or -1."""

    positions: Tensor
    slot: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """States of the selected tokens: [B, S, d] -> [B, K, d]."""
        return sctd_kernels.gather_tokens(x, self.positions, self.slot)

    def merge(self, x: Tensor, y: Tensor) -> Tensor:
        """`x` [B, S, d] with the states of the selected tokens replaced by `y` [B, K, d]."""
        return sctd_kernels.merge_tokens(x, y, self.positions, self.slot)

    def take_rows(self, rows: range) -> Selection:
        """The same for some rows of the micro-batch, as views."""
        part = slice(rows.start, None, rows.step)
        return Selection(self.positions[part], self.slot[part])


class Importance(ABC):
    """A score per vocabulary id; each row keeps its tokens of highest score.

    scores: [V] fp32, always (a running mean with decay 0.995 stalls in bf16). It lives outside the module, so no cast of
    the model reaches it, and it follows the data's device.
    """

    name: ClassVar[str]
    """The value of sctd.importance that chooses the policy."""
    has_table: ClassVar[bool] = True
    """Whether `scores` say anything: exported with the model, and used by whoever analyses it."""

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

    def select(self, input_ids: Tensor, keep: int, attention_mask: Tensor | None) -> Selection:
        """Choose `keep` tokens of each row of the corrupted ids [B, S]; attention_mask [B, S], 0 at padding, or None.

        The first token ([CLS]) is always kept and padding is dropped first; see `sctd_kernels.select_tokens`.
        """
        self.to(input_ids.device)
        return Selection(*sctd_kernels.select_tokens(self.scores, input_ids, keep, attention_mask))

    def record(self, labels: Tensor, losses: Tensor, ignore_index: int) -> None:
        """Add one micro-batch: labels [N] and their fp32 losses [N]. Ignored labels and non-finite losses add nothing."""
        sctd_kernels.record_losses(self._stats, labels, losses, ignore_index)

    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """Finish an applied optimizer step: one all-reduce of 2V numbers, then new scores."""
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(self._stats, group=group)
        self._learn()
        self._pin()
        self._stats.zero_()

    def discard(self) -> None:
        """Forget what was recorded since the last update: the step was skipped."""
        self._stats.zero_()

    def adopt(self, policy: str, scores: Tensor) -> bool:
        """Continue with the [V] scores that `policy` left beside an exported model; False where they do not suffice."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The table, on the CPU."""
        return {"scores": self.scores.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the vocabulary must be the same.

        The pins are those of this policy. An id that only the stored table pinned starts at START, as nothing is known of it.
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

    @abstractmethod
    def _learn(self) -> None:
        """Turn the step's statistics into new scores."""

    def _pin(self) -> None:
        self.scores.index_fill_(0, self.keep_token_ids, PINNED)


class LossImportance(Importance):
    """Tokens that are hard to predict are important: the running masked-LM loss of each id (the paper, and the default)."""

    name = "loss"

    def adopt(self, policy: str, scores: Tensor) -> bool:
        if policy != self.name:
            return False
        self.load_state_dict({"scores": scores})
        return True

    def _learn(self) -> None:
        sctd_kernels.update_scores(self.scores, self._stats, self.decay)


class FrequencyImportance(Importance):
    """Rare tokens are important: score = log((n + 1) / (count + 1)) over the labels seen so far."""

    name = "frequency"

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
    """No token is important: positions are dropped at random, but for the pinned ids. The control of every comparison."""

    name = "random"
    has_table = False

    def select(self, input_ids: Tensor, keep: int, attention_mask: Tensor | None) -> Selection:
        self.to(input_ids.device)
        draws = torch.rand(input_ids.numel(), dtype=torch.float32, device=input_ids.device)
        scores = torch.where(torch.isin(input_ids.flatten(), self.keep_token_ids), PINNED, draws)
        # The kernel looks scores up by id. Here each token has a score of its own, so its number in the batch is its id.
        numbers = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        return Selection(*sctd_kernels.select_tokens(scores, numbers, keep, attention_mask))

    def record(self, labels: Tensor, losses: Tensor, ignore_index: int) -> None:
        """Nothing to learn."""

    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """Nothing to learn."""

    def _learn(self) -> None:
        """Nothing to learn."""


POLICIES: dict[str, type[Importance]] = {
    policy.name: policy for policy in (LossImportance, FrequencyImportance, RandomImportance)
}
