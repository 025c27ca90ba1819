"""The arms of the equal-compute study: what each trains, and how many steps its budget buys.

Operations are those of `sctd_ds.method.flops`, forward and backward, over the schedule that the arm really follows. One dense
step of the study's model is the unit: "a budget of 2000" is what 2000 dense steps cost.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sctd_ds.config import ConfigError, ScTDConfig
from sctd_ds.method.flops import Shape, sequence_flops
from sctd_ds.method.schedule import mean_cost, modes

Regime = Literal["scratch", "trunk"]
REGIMES: tuple[Regime, ...] = ("scratch", "trunk")

DENSE_BUDGETS = (0.75, 0.9, 1.0, 1.15, 1.35)  # shares of the budget at which dense training is measured
CONTROL = "dense-1"  # dense training of exactly the budget
STARTS = (0, 0.05, 0.1, 0.2, 0.4)  # dense_start, a share of the arm's steps
FINISH = 0.2  # dense_finish of the arms whose name ends in -finish


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget.

    method: settings of ScTDConfig. budget: a factor. fewer_layers, fewer_rows: three quarters of the study's.
    """

    method: Mapping[str, Any]
    budget: float = 1.0
    fewer_layers: bool = False
    fewer_rows: bool = False

    def config(self, steps: int) -> ScTDConfig:
        """The method, for a run of `steps` steps."""
        return ScTDConfig(**self.method, total_steps=steps)

    def layers(self, layers: int) -> int:
        """Encoder layers of this arm's model, where the study's model has `layers`."""
        return layers - layers // 4 if self.fewer_layers else layers

    def rows(self, rows: int) -> int:
        """Rows per step of this arm, where the study has `rows`."""
        return rows - rows // 4 if self.fewer_rows else rows


def _arms() -> dict[str, Arm]:
    arms = {f"dense-{share:g}": Arm({"method": "dense"}, budget=share) for share in DENSE_BUDGETS}
    arms["fewer-layers"] = Arm({"method": "dense"}, fewer_layers=True)
    arms["fewer-rows"] = Arm({"method": "dense"}, fewer_rows=True)  # as many steps as token_drop, about, and each of them dense
    methods: dict[str, dict[str, Any]] = {
        "token_drop": {"method": "token_drop"},
        "sctd": {"method": "sctd"},
        "random": {"method": "token_drop", "importance": "random"},
        "sctd-no-kl": {"method": "sctd", "kl_weight": 0.0},
        "random-align": {"method": "sctd", "importance": "random"},
    }
    for name, method in methods.items():
        for start in STARTS:
            arms[f"{name}-{start:g}"] = Arm({**method, "dense_start": start})
            arms[f"{name}-{start:g}-finish"] = Arm({**method, "dense_start": start, "dense_finish": FINISH})
    return arms


ARMS: dict[str, Arm] = _arms()
DEFAULT = ("dense-*", "fewer-*", *(f"{name}-{start:g}" for name in ("token_drop", "sctd", "random") for start in STARTS))


class Study(BaseModel):
    """What all runs of a folder have in common: model, data, rate and budgets. Its values stand in every run's file."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    budget: int = 2000
    """from scratch: dense steps whose operations an arm spends"""
    trunk_steps: int = 1500
    """dense steps of the shared trunk"""
    trunk_budget: int = 800
    """from the trunk: dense steps whose operations an arm spends"""
    rate: float = 2e-3
    """peak learning rate"""
    warmup: int = 100
    """steps of linear warm-up"""
    layers: int = 8
    """encoder layers"""
    hidden: int = 64
    """hidden size"""
    heads: int = 2
    """attention heads"""
    intermediate: int = 256
    """width of the feed-forward layers"""
    length: int = 32
    """tokens per row, [CLS] and [SEP] included"""
    rows: int = 48
    """rows per step"""
    text: str = "language"
    """what the arms learn: "language", "language:SEED" (other words), or a source of `python -m sctd_ds.data build`"""
    trunk_text: str = "language"
    """what the trunk learned; its vocabulary covers both texts"""
    dropout: float = 0.1
    """dropout of hidden states and attention"""
    initializer: float = 0.02
    """standard deviation of the first weights"""
    documents: int = 120_000
    """documents of a generated language, training and held-out together"""
    lexicon: float = 1.0
    """size of a generated language's lexicon, against the default one"""
    vocabulary: int = 8000
    """most entries of the vocabulary"""
    labels: int = 100_000
    """labelled tokens of the validation set, at least"""

    def settings(self, regime: Regime) -> dict[str, Any]:
        """The values that matter in a regime."""
        other = ("budget",) if regime == "trunk" else ("trunk_steps", "trunk_budget", "trunk_text")
        return {name: value for name, value in self.model_dump().items() if name not in other}

    def budget_of(self, regime: Regime) -> int:
        """The budget in dense steps."""
        return self.trunk_budget if regime == "trunk" else self.budget


class Costs:
    """What steps and runs cost, in dense steps of the study's model. shape: that model's; rows: those of a step."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self._shape, self._rows = shape, rows
        self._unit = sequence_flops(shape, ScTDConfig(method="dense"), "dense")

    def of_modes(self, arm: Arm, config: ScTDConfig) -> dict[str, float]:
        """The cost of one step in each mode of `config`."""
        shape = replace(self._shape, layers=arm.layers(self._shape.layers))
        share = arm.rows(self._rows) / self._rows
        return {mode: share * sequence_flops(shape, config, mode) / self._unit for mode in modes(config)}

    def of_run(self, arm: Arm, steps: int) -> float:
        """The cost of a whole run of `steps` steps."""
        config = arm.config(steps)
        return steps * mean_cost(config, self.of_modes(arm, config))

    def steps(self, arm: Arm, budget: float) -> int:
        """The largest number of steps that costs at most the arm's share of `budget`. Raises ConfigError where it is none."""
        allowed = arm.budget * budget
        low, high = 0, 2
        while self.of_run(arm, high) <= allowed:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.of_run(arm, middle) <= allowed else (low, middle)
        if low == 0:
            raise ConfigError(f"a budget of {allowed:g} dense steps buys no step: raise it")
        return low


def choose(patterns: Sequence[str], regimes: Sequence[Regime]) -> dict[str, Arm]:
    """The arms that match one of the patterns, in the patterns' order. Raises ConfigError for a pattern without an arm."""
    chosen: dict[str, Arm] = {}
    for pattern in patterns:
        names = [name for name in ARMS if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError(f"--arms {pattern}: no arm has this name; --list prints all of them")
        chosen.update((name, ARMS[name]) for name in names)
    if set(regimes) == {"trunk"} and all(arm.fewer_layers for arm in chosen.values()):
        raise ConfigError("--arms fewer-layers: the trunk has all layers, so this arm exists from scratch only")
    return chosen
