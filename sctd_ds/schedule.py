"""When steps align, where tokens go, how many are kept, and what that costs: pure functions of the configuration.

Layers are counted from 0 here; the paper and the README count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sctd_ds.config import ConfigError, ScTDConfig

Mode = Literal["dense", "drop", "align"]
MODES: tuple[Mode, ...] = ("dense", "drop", "align")


@dataclass(frozen=True)
class LayerPlan:
    """Which of the `layers` encoder layers see which tokens (DESIGN: 12 layers -> 1-5 full, 6 cross, 7-11 kept, 12 full)."""

    layers: int

    def __post_init__(self) -> None:
        if self.layers < 4:
            raise ConfigError(
                f"the model has {self.layers} encoder layers, but token dropping needs at least 4: one full, one cross "
                "(kept tokens attend to all), one kept-only and one last layer"
            )

    @property
    def full(self) -> range:
        """Layers on all tokens; dropped tokens leave with the output of the last of them."""
        return range(self.cross)

    @property
    def cross(self) -> int:
        """The layer whose queries are the kept tokens and whose keys and values are all tokens."""
        return self.layers // 2 - 1

    @property
    def kept(self) -> range:
        """Layers on the kept tokens alone."""
        return range(self.cross + 1, self.layers - 1)

    @property
    def last(self) -> int:
        """The layer where the dropped tokens come back."""
        return self.layers - 1


def kept_tokens(length: int, drop_ratio: float) -> int:
    """K = S - floor(S * drop_ratio)."""
    return length - math.floor(length * drop_ratio)


def step_mode(config: ScTDConfig, step: int) -> Mode:
    """What optimizer step `step` (1-based) does. With align_schedule "spread" every step aligns some of its rows."""
    if config.method == "dense":
        return "dense"
    if config.method == "token_drop":
        return "drop"
    return "align" if config.align_schedule == "spread" or step % config.interval == 0 else "drop"


def aligned_rows(config: ScTDConfig, step: int | None, rows: int) -> range:
    """Rows of a micro-batch that an align step aligns: all, or with "spread" those with (row + step) % interval == 0."""
    if config.align_schedule == "interval" or step is None:
        return range(rows)
    return range(-step % config.interval, rows, config.interval)


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the cost of a step: the encoder's, the row's, and the labelled tokens of a row."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    length: int
    labels: int


def sequence_flops(shape: Shape, config: ScTDConfig, mode: Mode, head_rows: int | None = None) -> float:
    """Floating-point operations of one sequence, forward and backward; see `part_flops`."""
    return sum(part_flops(shape, config, mode, head_rows))


def part_flops(shape: Shape, config: ScTDConfig, mode: Mode, head_rows: int | None = None) -> list[float]:
    """Operations of one sequence in each encoder layer and, last, in the head, forward and backward (twice the forward).

    A product of [m, k] and [k, n] counts 2mkn; attention counts 4 * queries * keys * hidden; normalisation, activation and
    softmax count nothing. head_rows: rows the output head of a plain model runs on, whose last layer runs everywhere
    (default: the labelled ones, and the last layer as `config` says). An "align" sequence with the "spread" schedule is the
    average over a row that aligns and interval - 1 rows that do not.
    """
    d, f, s = shape.hidden, shape.intermediate, shape.length
    k = kept_tokens(s, config.drop_ratio)

    def layer(queries: int, keys: int) -> float:
        return 4 * queries * d * d + 4 * keys * d * d + 4 * queries * d * f + 4 * queries * keys * d

    rows = shape.labels if head_rows is None else head_rows
    head = 2 * rows * d * (d + shape.vocabulary)
    reads_all = mode == "align" and config.align_on != "cls"
    narrow = head_rows is None and config.last_layer == "labelled" and not reads_all
    last = layer(min(shape.labels + 1, s) if narrow else s, s)
    full = [*[layer(s, s)] * (shape.layers - 1), last]
    if mode == "dense":
        return [3 * flops for flops in (*full, head)]
    plan = LayerPlan(shape.layers)
    dropped = [*full[: plan.cross], layer(k, s), *[layer(k, k)] * len(plan.kept), last, head]
    if mode == "drop":
        return [3 * flops for flops in dropped]
    share = 1 / config.interval if config.align_schedule == "spread" else 1
    if config.shared_prefix:
        full[: plan.cross] = [0] * plan.cross
    full.append(0 if config.objective == "released" else head)
    return [3 * (a + share * b) for a, b in zip(dropped, full, strict=True)]


def align_share(config: ScTDConfig) -> float:
    """Share of the optimizer steps whose mode is "align"."""
    if config.method != "sctd":
        return 0.0
    return 1.0 if config.align_schedule == "spread" else 1.0 / config.interval


def mean_cost(config: ScTDConfig, cost: Mapping[str, float]) -> float:
    """Average over the schedule of a cost per mode: FLOPs or milliseconds."""
    if config.method == "dense":
        return cost["dense"]
    share = align_share(config)
    return (share * cost["align"] if share else 0.0) + ((1 - share) * cost["drop"] if share < 1 else 0.0)


def flops_saved(shape: Shape, config: ScTDConfig) -> float:
    """Fraction of the dense step's operations that the method saves on average."""
    modes: tuple[Mode, ...] = ("dense",) if config.method == "dense" else MODES  # a dense model may be too shallow to drop
    cost: dict[str, float] = {mode: sequence_flops(shape, config, mode) for mode in modes}
    return 1 - mean_cost(config, cost) / cost["dense"]
