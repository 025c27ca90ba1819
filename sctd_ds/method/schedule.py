"""When training is dense, when it drops tokens and when it aligns: pure functions of the configuration and the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from sctd_ds.config import ConfigError, ScTDConfig

Mode = Literal["dense", "drop", "align"]
MODES: tuple[Mode, ...] = ("dense", "drop", "align")


def step_mode(config: ScTDConfig, step: int) -> Mode:
    """What optimizer step `step` (1-based) does. With align_schedule "spread" every dropping step aligns some of its rows.

    Raises ConfigError where the number of steps has to be known and is not.
    """
    start, end = dropping_phase(config)
    if not start < step <= end:
        return "dense"
    if config.method == "token_drop":
        return "drop"
    return "align" if config.align_schedule == "spread" or step % config.interval == 0 else "drop"


def dropping_phase(config: ScTDConfig) -> tuple[float, float]:
    """The steps that drop tokens, as (start, end): all steps t with start < t <= end; the others are dense.

    Raises ConfigError where the number of steps has to be known and is not, or where no step is left to drop in.
    """
    if config.method == "dense":
        return math.inf, math.inf
    start, finish = _steps(config, "dense_start"), _steps(config, "dense_finish")
    end = config.total_steps - finish if config.total_steps is not None else math.inf
    if start >= end:
        raise ConfigError(
            f"sctd.dense_start={config.dense_start} and sctd.dense_finish={config.dense_finish} make all "
            f'{config.total_steps} steps dense: shorten them, or use "method": "dense"'
        )
    return start, end


def dense_phases(config: ScTDConfig) -> list[tuple[int, int]]:
    """First and last step of each dense phase of a run that drops tokens at other times; its number of steps is known."""
    assert config.total_steps is not None
    if config.method == "dense":
        return []
    start, end = (int(step) for step in dropping_phase(config))
    return [(first, last) for first, last in ((1, start), (end + 1, config.total_steps)) if first <= last]


def _steps(config: ScTDConfig, key: Literal["dense_start", "dense_finish"]) -> int:
    """The length of a dense phase in steps."""
    length, total = getattr(config, key), config.total_steps
    is_share = 0 < length < 1
    if total is None and (is_share or (key == "dense_finish" and length)):
        raise ConfigError(
            f"sctd.{key}={length} counts from the number of steps of the run, which is not known here: set sctd.total_steps"
        )
    return round(length * total) if is_share else int(length)


def aligned_rows(config: ScTDConfig, step: int | None, rows: int) -> range:
    """Rows of a micro-batch that an align step aligns: all, or with "spread" those with (row + step) % interval == 0."""
    if config.align_schedule == "interval" or step is None:
        return range(rows)
    return range(-step % config.interval, rows, config.interval)


def modes(config: ScTDConfig) -> tuple[Mode, ...]:
    """The modes whose cost matters: those of the method's steps, and dense, with which they are compared."""
    return MODES[: {"dense": 1, "token_drop": 2, "sctd": 3}[config.method]]


def mode_shares(config: ScTDConfig) -> dict[Mode, float]:
    """Share of the run's optimizer steps by mode; without a known number of steps, that of an endless run."""
    if config.method == "dense":
        return {"dense": 1.0, "drop": 0.0, "align": 0.0}
    (start, end), total = dropping_phase(config), config.total_steps
    if total is None:
        dropping, aligned = 1.0, 1.0 / config.interval
    else:
        dropping = (end - start) / total
        aligned = (end // config.interval - start // config.interval) / total
    if config.method == "token_drop":
        aligned = 0.0
    elif config.align_schedule == "spread":
        aligned = dropping
    return {"dense": 1.0 - dropping, "drop": dropping - aligned, "align": aligned}


def mean_cost(config: ScTDConfig, cost: Mapping[str, float]) -> float:
    """Average over the run's steps of a cost per mode, for example in FLOPs or milliseconds."""
    return sum(share * cost[mode] for mode, share in mode_shares(config).items() if share)
