"""What the runs of the equal-compute study show: results.csv, curves.csv, tables.md and one figure.

Everything is read from the JSON files that `benchmarks.equal_compute` writes, one per finished run. The compute multiplier of a
run: operations that dense training needs for the run's validation loss, divided by the run's own operations. Dense training's
need is interpolated between the dense runs of the same regime and seed.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.equal_compute_arms import ARMS, CONTROL, REGIMES
from sctd_ds.eval.report import table

RULE = (
    "Decision rule, written before any run: the screening seeds choose arms, and other seeds confirm them. In each regime, the "
    "two arms with the highest mean multiplier go to confirmation if that mean is above 1. There, with twelve seeds that no "
    "screening used, an arm wins if the lower end of its 95 % interval is above 1.05 from scratch or 1.10 from the trunk."
)
LEGEND = (
    "Losses are masked-LM losses of the full pass in nats per label, on one held-out set. Every arm spends the same operations "
    "and decays its learning rate to zero over its own steps. *Against dense*: loss minus that of dense training with the same "
    "seed and operations, the mean and each seed; negative is better. *Multiplier*: operations that dense training needs for "
    "the arm's loss, divided by the arm's operations; above 1 is better. A seed whose loss lies outside its dense runs counts "
    "with the nearest dense run, and the mean then carries > (at least), < (at most) or, with both, about. The interval is a "
    "95 % bootstrap over seeds; with few seeds it is little more than their range."
)
TITLES = {"scratch": "From scratch", "trunk": "From a trained dense trunk"}
# Does the alignment matter, or the choice of tokens? Every row changes one thing.
WHY = {
    "sctd": "the method: tokens chosen by loss, aligned steps with KL",
    "sctd-no-kl": "aligned steps without the KL terms (kl_weight 0): the full pass's loss remains",
    "token_drop": "no aligned steps: tokens chosen by loss (ScTD with an interval longer than the run is the same)",
    "random-align": "random tokens, aligned steps with KL",
    "random": "random tokens, no aligned steps",
}
DRAWS = 10_000  # of the bootstrap

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""The records of one regime, by arm and seed."""


@dataclass(frozen=True)
class Multiplier:
    """A compute multiplier; bound: "" where it was interpolated, ">" or "<" where the loss lies outside the dense runs."""

    value: float
    bound: str = ""


def multiplier(dense: Sequence[tuple[float, float]], operations: float, loss: float) -> Multiplier:
    """Operations dense training needs for `loss`, over `operations`.

    dense: (operations, loss) of two dense runs or more. Their losses are first made to fall with operations (isotonic
    regression); between them, loss is linear in the logarithm of operations.
    """
    points = _falling(sorted(dense))
    (first, worst), (last, best) = points[0], points[-1]
    if loss > worst:
        return Multiplier(math.exp(first) / operations, "<")
    if loss < best:
        return Multiplier(math.exp(last) / operations, ">")
    logs, losses = zip(*reversed(points), strict=True)
    return Multiplier(math.exp(float(np.interp(loss, losses, logs))) / operations)


def _falling(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(log operations, loss) with strictly falling losses: neighbours that rise become one point, their mean."""
    blocks: list[tuple[float, float, int]] = []
    for operations, loss in points:
        blocks.append((math.log(operations), loss, 1))
        while len(blocks) > 1 and blocks[-2][1] <= blocks[-1][1]:
            (x, y, n), (x2, y2, n2) = blocks[-2:]
            blocks[-2:] = [((x * n + x2 * n2) / (n + n2), (y * n + y2 * n2) / (n + n2), n + n2)]
    return [(x, y) for x, y, _ in blocks]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of the mean over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).choice(np.asarray(values), (DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def load(folder: Path) -> dict[str, Runs]:
    """The finished runs by regime, arm and seed, arms in the order of the study."""
    found: dict[str, Runs] = {}
    for regime in REGIMES:
        paths = {name: sorted((folder / "runs" / regime / name).glob("seed-*.json")) for name in ARMS}
        records = {name: [json.loads(path.read_text(encoding="utf-8")) for path in of] for name, of in paths.items() if of}
        if records:
            found[regime] = {name: {record["seed"]: record for record in of} for name, of in records.items()}
    return found


def multipliers(runs: Runs, name: str) -> dict[int, Multiplier]:
    """The multiplier of an arm by seed, of those seeds with at least two dense runs."""
    result = {}
    for seed, record in runs[name].items():
        dense = [(of[seed]["dense_steps"], of[seed]["loss_full"]) for arm, of in runs.items()
                 if arm.startswith("dense-") and seed in of]  # fmt: skip
        if len(dense) > 1:
            result[seed] = multiplier(dense, record["dense_steps"], record["loss_full"])
    return result


def write(folder: Path) -> str:
    """Write results.csv, curves.csv, tables.md and equal_compute.png of the finished runs; returns the Markdown."""
    found = load(folder)
    parts = ["# Equal compute"]
    if not found:
        parts.append("No run is finished.")
    else:
        parts += [_origin(found), LEGEND, RULE]
        for regime, runs in found.items():
            parts += [f"## {TITLES[regime]}", _about(runs), arms_table(runs)]
        parts += why_tables(found)
        _write_results(folder / "results.csv", found)
        _write_curves(folder / "curves.csv", found)
        _plot(found, folder / "equal_compute.png")
    text = "\n\n".join(parts) + "\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    return text


def arms_table(runs: Runs, names: Sequence[str] | None = None) -> str:
    """A row per arm: its size, its losses, its difference to dense training and its multiplier."""
    rows = []
    for name in names or runs:
        records = list(runs[name].values())
        steps = records[0]["steps"]
        dense = sum(record["modes"].get("dense", 0) / record["steps"] for record in records) / len(records)
        cost = statistics.fmean(record["dense_steps"] for record in records)
        rows.append([name, len(records), steps, f"{dense:.0%}", f"{cost:.0f}", _loss(records), _against_dense(runs, name),
                     _multiplier(multipliers(runs, name))])  # fmt: skip
    head = ["arm", "seeds", "steps", "of them dense", "operations (dense steps)", "loss", "against dense", "multiplier [95 %]"]
    return table(head, rows)


def why_tables(found: Mapping[str, Runs]) -> list[str]:
    """For every regime and dense start at which one of the changed methods ran: the methods side by side."""
    parts = []
    for regime, runs in found.items():
        endings = {
            name.removeprefix(method) for name in runs for method in ("sctd-no-kl", "random-align") if name.startswith(method)
        }
        for ending in sorted(endings):
            names = [f"{method}{ending}" for method in WHY if f"{method}{ending}" in runs]
            parts += [f"## Why: {TITLES[regime].lower()}, arms {ending.removeprefix('-')}", arms_table(runs, names)]
    if parts:
        parts.append("\n".join(f"- `{method}`: {text}" for method, text in WHY.items()))
    return parts


def _loss(records: Sequence[Mapping[str, Any]]) -> str:
    losses = [record["loss_full"] for record in records]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{spread}"


def differences(runs: Runs, name: str) -> dict[int, float]:
    """Loss minus that of dense training of the same operations, by seed."""
    control = runs.get(CONTROL, {})
    return {seed: r["loss_full"] - control[seed]["loss_full"] for seed, r in runs[name].items() if seed in control}


def _against_dense(runs: Runs, name: str) -> str:
    values = differences(runs, name)
    if name == CONTROL or not values:
        return ""
    each = ", ".join(f"{value:+.3f}" for _, value in sorted(values.items()))
    return f"{statistics.fmean(values.values()):+.4f} ({each})"


def _multiplier(found: Mapping[int, Multiplier]) -> str:
    if not found:
        return ""
    values, bounds = [m.value for m in found.values()], {m.bound for m in found.values()} - {""}
    sign = "".join(sorted(bounds)) if len(bounds) < 2 else "about "
    between = interval(values)
    spread = f" [{between[0]:.2f}, {between[1]:.2f}]" if between else ""
    return f"{sign}{' ' if len(bounds) == 1 else ''}{statistics.fmean(values):.2f}{spread}"


def _about(runs: Runs) -> str:
    """The settings of a regime in one sentence."""
    settings = next(iter(next(iter(runs.values())).values()))["settings"]
    return "Settings: " + ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("method", "data")) + "."


def _origin(found: Mapping[str, Runs]) -> str:
    """Where and with what the runs were made."""
    records = [record for runs in found.values() for of in runs.values() for record in of.values()]
    machine = ", ".join(f"{name} {value}" for name, value in records[0]["environment"].items())
    commits = ", ".join(sorted({record["commit"] for record in records}))
    seeds = ", ".join(str(seed) for seed in sorted({record["seed"] for record in records}))
    hours = sum(record["seconds"] for record in records) / 3600
    size = f"{len(records)} runs, seeds {seeds}, {records[0]['labels']:,} validation labels"
    return f"{size}, {hours:.1f} processor hours of training; commit {commits}; {machine}."


def _write_results(path: Path, found: Mapping[str, Runs]) -> None:
    """A line per run, with its multiplier."""
    measures = ("steps", "dense_steps", "layers", "labels", "loss_full", "seconds", "commit")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["regime", "arm", "seed", *measures, "gap", "dense", "drop", "align", "multiplier", "bound"])
        for regime, runs in found.items():
            for name, by_seed in runs.items():
                worth = multipliers(runs, name)
                for seed, record in sorted(by_seed.items()):
                    modes = [record["modes"].get(mode, 0) for mode in ("dense", "drop", "align")]
                    end = [f"{worth[seed].value:.4f}", worth[seed].bound] if seed in worth else ["", ""]
                    gap = record["points"][-1].get("gap", "") if record["points"] else ""
                    writer.writerow([regime, name, seed, *(record[key] for key in measures), gap, *modes, *end])


def _write_curves(path: Path, found: Mapping[str, Runs]) -> None:
    """A line per window of training steps and per validation along a run, each at its last step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["regime", "arm", "seed", "step", "training_loss", "dense_steps", "loss_full", "gap"])
        for regime, runs in found.items():
            for name, by_seed in runs.items():
                for seed, record in sorted(by_seed.items()):
                    place = [regime, name, seed]
                    writer.writerows([*place, step, f"{loss:.4f}", "", "", ""] for step, loss in record["training"])
                    for point in record["points"]:
                        values = [f"{point[key]:.4f}" if key in point else "" for key in ("dense_steps", "loss_full", "gap")]
                        writer.writerow([*place, point["step"], "", *values])


def _plot(found: Mapping[str, Runs], path: Path) -> None:
    """A row per regime: the dense runs against operations, and beside them the arms on the same scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, sharey="row", width_ratios=(1, 2))
    for (left, right), (regime, runs) in zip(grid, found.items(), strict=True):
        shifts = {name: differences(runs, name) for name in runs}
        shifts = {name: shift for name, shift in shifts.items() if shift}
        dense = {ARMS[name].budget: shift for name, shift in shifts.items() if name.startswith("dense-")}
        means = {budget: statistics.fmean(shift.values()) for budget, shift in dense.items()}
        _plot_dense(left, dense, means)
        left.set(title=f"{TITLES[regime]}: dense training", xlabel="operations, as a share of the budget")
        left.set_ylabel("validation loss minus that of dense training\nof the same seed and the whole budget (nats)")
        _plot_arms(right, {name: shift for name, shift in shifts.items() if not name.startswith("dense-")}, means)
        right.set(title="arms of the same operations: seeds and their mean; dashed: dense training of so many operations")
    figure.savefig(path, dpi=110)


def _plot_dense(axis: Any, dense: Mapping[float, Mapping[int, float]], means: Mapping[float, float]) -> None:
    """Differences in loss by share of the budget: a line per seed, and their mean."""
    for seed in sorted({seed for shift in dense.values() for seed in shift}):
        known = [(budget, shift[seed]) for budget, shift in dense.items() if seed in shift]
        axis.plot(*zip(*known, strict=True), marker=".", lw=0.8, alpha=0.5, label=f"seed {seed}")
    axis.plot([*means], [*means.values()], "k", lw=1.5, label="mean")
    axis.set_xscale("log")
    axis.set_xticks([*means], [f"{budget:g}" for budget in means])
    axis.minorticks_off()
    axis.legend(fontsize=7)


def _plot_arms(axis: Any, shifts: Mapping[str, Mapping[int, float]], dense: Mapping[float, float]) -> None:
    """A place per arm, and a dashed line for each dense mean. What is far worse than all of these stands at the upper edge."""
    ceiling = 2 * max([mean for mean in dense.values() if mean > 0], default=math.inf)
    for place, shift in enumerate(shifts.values()):
        mean = statistics.fmean(shift.values())
        if mean > ceiling:
            axis.plot(place, ceiling, "^", color="tab:red")
            axis.annotate(f"{mean:+.2f}", (place, 0.95 * ceiling), fontsize=7, va="top", ha="center")
        else:
            axis.plot([place] * len(shift), [*shift.values()], "o", color="tab:blue", alpha=0.5, ms=4)
            axis.plot([place - 0.3, place + 0.3], [mean] * 2, color="tab:blue", lw=2)
    for budget, mean in dense.items():
        axis.axhline(mean, color="0.6", lw=0.8, ls="--")
        axis.annotate(f"{budget:g}", (len(shifts) - 0.4, mean), fontsize=7, va="bottom", ha="right", color="0.4")
    axis.set_xticks(range(len(shifts)), [*shifts], rotation=30, ha="right")
