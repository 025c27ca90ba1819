"""When steps align, and which rows: pure functions of the configuration and the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sctd_ds.config import ScTDConfig

Mode = Literal["dense", "drop", "align"]
MODES: tuple[Mode, ...] = ("dense", "drop", "align")


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


def modes(config: ScTDConfig) -> tuple[Mode, ...]:
    """The modes whose cost matters: those of the method's steps, and dense, with which they are compared."""
    return MODES[: {"dense": 1, "token_drop": 2, "sctd": 3}[config.method]]


def align_share(config: ScTDConfig) -> float:
    """Share of the optimizer steps whose mode is "align"."""
    if config.method != "sctd":
        return 0.0
    return 1.0 if config.align_schedule == "spread" else 1.0 / config.interval


def mean_cost(config: ScTDConfig, cost: Mapping[str, float]) -> float:
    """Average over the schedule of a cost per mode, for example in FLOPs or milliseconds."""
    if config.method == "dense":
        return cost["dense"]
    share = align_share(config)
    return (share * cost["align"] if share else 0.0) + ((1 - share) * cost["drop"] if share < 1 else 0.0)
