"""Where tokens go: which encoder layers see all tokens, and which see the kept ones.

Layers are counted from 0 here; the paper and the README count from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sctd_ds.config import ConfigError

Region = Literal["full", "cross", "kept", "last"]


@dataclass(frozen=True)
class LayerPlan:
    """The route of the dropped pass through `layers` encoder layers; the full pass sees all tokens in every layer.

    12 layers, counted from 1: 1-5 full, 6 cross, 7-11 kept, 12 last. drops: False for a model that is only trained dense.
    """

    layers: int
    drops: bool = True

    def __post_init__(self) -> None:
        if self.drops and self.layers < 4:
            raise ConfigError(
                f"the model has {self.layers} encoder layers, but token dropping needs at least 4: one full, one cross "
                '(kept tokens attend to all), one kept-only and one last layer; use a deeper model, or "method": "dense"'
            )

    @property
    def full(self) -> range:
        """Layers on all tokens. Dropped tokens leave with the output of the last of them."""
        return range(self.cross if self.drops else self.last)

    @property
    def cross(self) -> int:
        """The layer whose queries are the kept tokens and whose keys and values are all tokens."""
        return self.layers // 2 - 1

    @property
    def kept(self) -> range:
        """Layers on the kept tokens alone."""
        return range(self.cross + 1, self.last) if self.drops else range(0)

    @property
    def last(self) -> int:
        """The layer where the dropped tokens come back."""
        return self.layers - 1

    def region(self, layer: int) -> Region:
        """The part of the route that `layer` belongs to."""
        if layer == self.last:
            return "last"
        if layer in self.full:
            return "full"
        return "cross" if layer == self.cross else "kept"


def kept_tokens(length: int, drop_ratio: float) -> int:
    """K = S - floor(S * drop_ratio)."""
    return length - math.floor(length * drop_ratio)
