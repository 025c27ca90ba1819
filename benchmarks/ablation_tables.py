"""The results of an ablation: results.csv, curves.csv, tables.md with the paper's results, and a figure per sweep.

`benchmarks.ablate` fills the folders that are read here, below its --out: DIR/runs/RUN with the files
of `pretrain.py`, and DIR/eval/scores with the outcomes of the evaluation. Unfinished runs are omitted.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sctd_ds.eval.report import mean_of, paired_p, table
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS
from sctd_ds.method.flops import Shape, sequence_flops
from sctd_ds.run import metrics
from sctd_ds.run.models import model_config
from sctd_ds.run.settings import RunConfig

# The paper's results by sweep: columns, and their values by variant. Figure 7 prints no numbers.
PAPER: dict[str, tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    "method": (("GLUE",), {"dense": (81.11,), "token_drop": (80.35,), "sctd": (81.72,)}),
    "objective": (
        ("GLUE", "SuperGLUE", "SQuAD"),
        {
            "dense": (77.73, 69.11, 74.15),
            "token_drop": (76.58, 68.01, 72.28),
            "L_MLM": (78.30, 68.73, 75.56),
            "L_SCl": (78.06, 69.49, 75.66),
            "L_SCg": (79.27, 68.64, 75.80),
            "L_MLM+L_SCl": (78.51, 69.64, 75.51),
            "L_MLM+L_SCg": (79.26, 69.32, 75.59),
            "L_SCl+L_SCg": (79.36, 69.89, 75.91),
            "sctd": (79.58, 70.29, 76.01),
        },
    ),
    "interval": (
        ("time saved (%)", "GLUE", "SQuAD"),
        {
            "dense": (0.0, 77.73, 74.15),
            "token_drop": (21.5, 76.58, 72.28),
            "Fi=5": (4.9, 78.96, 75.49),
            "Fi=10": (13.8, 79.58, 75.80),
            "Fi=20": (18.1, 78.45, 75.74),
            "Fi=50": (20.5, 79.01, 75.04),
        },
    ),
    "lambda": ((), {}),
}
TITLE = {
    "method": "Table 2 and Figure 6: method (BERT-base, 250K steps)",
    "objective": "Table 4: training objectives (BERT-large, 35K steps)",
    "interval": "Table 5: interval Fi (BERT-large, 35K steps)",
    "lambda": "Figure 7: lambda (BERT-large, 35K steps)",
}
NOTE = {
    "objective": "Terms in addition to the dropped pass's loss: L_MLM, the loss of the full pass; L_SCl, the KL of layer l-1; "
    "L_SCg, the KL of layer l; sctd has all three. Rows without L_MLM use the released code's objective: the dropped pass's "
    "loss has weight 1 instead of 1/2, and the KL's gradient also reaches the full pass, while rows with L_MLM stop it.",
}

LOSS, TIME, SAVED = "loss_full", "ms_per_step", "flops_saved"
FINE = (LOSS, "loss_drop", "cosine_previous")  # measures whose third and fourth digits matter
LAYERS = "pretrain.model.num_hidden_layers"  # the one setting of the sweeps that changes the cost of a dense step
BEGAN, REPORT = "began.json", "report.json"  # in a run's folder: the settings that it started with, and its final report


@dataclass(frozen=True)
class Run:
    """One pretraining. changes: its settings that differ from the base configuration, without the seed."""

    changes: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        changes = [f"{key.split('.')[-1]}-{value}" for key, value in self.changes] or ["base"]
        return "_".join([*changes, f"seed-{self.seed}"])

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.name

    def overrides(self) -> list[str]:
        pairs = [*self.changes, ("pretrain.seed", self.seed)]
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]


Runs = Mapping[str, Mapping[str, Sequence[Run]]]
"""By sweep and variant: a run per seed, the same seeds for all."""


def in_order(runs: Runs) -> list[Run]:
    """Every run once: sweep by sweep, and in each all variants of a seed before the next seed, so that a stop leaves pairs."""
    by_seed = [group for variants in runs.values() for group in zip(*variants.values(), strict=True)]
    return list(dict.fromkeys(run for group in by_seed for run in group))


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run: values at its end by measure, and measurements along it."""

    values: dict[str, float]
    points: list[dict[str, float]]
    """By step: "step", "seconds" of training so far (see `metrics.Point`), "dense_steps" (operations so far, in dense steps of
    the base), and measures."""


def write(out: Path, runs: Runs, base: RunConfig, *, about: str, tasks: Sequence[str] = (), synthetic: bool = False) -> str:
    """Write results.csv, curves.csv, tables.md and the figures of the finished runs; returns the Markdown.

    base: the configuration that the runs change. about: its name. tasks: those of the score; none: the probes.
    synthetic: whether probes and tasks are synthetic.
    """
    planned = in_order(runs)
    reports = {run: _json(run.folder(out) / REPORT) for run in planned if (run.folder(out) / REPORT).is_file()}
    finished = {run: outcome(run, report, base, out, tasks) for run, report in reports.items()}
    measures = _keys(result.values for result in finished.values())
    seeds = len({run.seed for run in planned})
    example = next(iter(reports.values()), None)
    head = [_origin(example, about, seeds), _legend(synthetic)] if example else ["No run is finished."]
    parts = ["# Ablations", *head]
    results, curves = [], []
    for sweep, variants in runs.items():
        outcomes: dict[str, dict[int, Outcome]] = {}
        for variant, planned_runs in variants.items():
            for run in planned_runs:
                if run not in finished:
                    continue
                outcomes.setdefault(variant, {})[run.seed] = finished[run]
                place = {"sweep": sweep, "variant": variant, "seed": run.seed}
                results.append({**place, "commit": _json(run.folder(out) / BEGAN)["commit"], **finished[run].values})
                curves += [{**place, **point} for point in finished[run].points]
        parts.append(f"## {TITLE[sweep]}")
        if sweep in NOTE:
            parts.append(NOTE[sweep])
        parts.append(compare(sweep, outcomes, measures))
        if outcomes:
            _plot(sweep, outcomes, out / f"{sweep}.png")
            parts.append(f"![]({sweep}.png)")
    _write_csv(out / "results.csv", ["commit", *measures], results)
    _write_csv(out / "curves.csv", _keys(point for result in finished.values() for point in result.points), curves)
    text = "\n\n".join(parts) + "\n"
    (out / "tables.md").write_text(text, encoding="utf-8")
    return text


def outcome(run: Run, report: Mapping[str, Any], base: RunConfig, out: Path, tasks: Sequence[str]) -> Outcome:
    """The results of a finished run. report: its report.json."""
    cost = operations(run, report, base)
    validation, found = report["validation"], measured(run.name, out)
    values = {key: validation[key] for key in FINE if key in validation}
    values[TIME] = report["global_batch"] / report["samples_per_s"] * 1000
    values[SAVED] = 100 * (1 - cost)
    values |= score(found, tasks) | found

    records, flops = metrics.read(run.folder(out) / "metrics.jsonl"), report["flops_per_sequence"]
    base_step = base_flops(run, report, base)
    points = []
    for point in metrics.curve(records, flops, batch=1):
        step = point.record["step"]
        scored = found if step == report["steps"] else measured(f"{run.name}@{step}", out)
        costs = {"step": step, "seconds": point.seconds, "dense_steps": point.operations / base_step}
        points.append({**costs, LOSS: point.record[LOSS], **score(scored, tasks)})
    return Outcome(values, points)


def operations(run: Run, report: Mapping[str, Any], base: RunConfig) -> float:
    """The operations of the run's mean step, in dense steps of the base's model with all its layers."""
    return (1 - report["flops_saved"]) * report["flops_per_sequence"]["dense"] / base_flops(run, report, base)


def base_flops(run: Run, report: Mapping[str, Any], base: RunConfig) -> float:
    """Operations of a sequence in a dense step of the base's model with all its layers.

    They are the run's own plus those of the layers that the run lacks, so no other run needs to be finished.
    """
    sizes = model_config(base.pretrain)
    length = base.pretrain.seq_length
    # The vocabulary costs operations in the head, which every run has, not in the layers that one lacks.
    whole = Shape.of(sizes, length=length, labels=round(base.pretrain.mlm_probability * length))
    shallow = replace(whole, layers=dict(run.changes).get(LAYERS, whole.layers))
    lacking = sequence_flops(whole, base.sctd, "dense") - sequence_flops(shallow, base.sctd, "dense")
    return report["flops_per_sequence"]["dense"] + lacking


def measured(name: str, out: Path) -> dict[str, float]:
    """The evaluation's results for a model, by measure, in percent."""
    values: dict[str, float] = {}
    for path in sorted((out / "eval" / "scores" / name).glob("*/*.json")):
        record = _json(path)
        task, found = record["task"], record["scores"]
        if task.startswith("probe-"):
            # Dropping affects the layer below the last most (Section 2.2 of the paper).
            values[f"{task} l-1, full"] = found["full_mean"][-2]
            values[f"{task} l-1, dropped"] = found["dropped_mean"][-2]
            values[f"{task} bag of words"] = found["bag_of_words"]
        else:
            values[task] = statistics.fmean(found[metric] for metric in TASKS[task].metrics)
    return values


def score(values: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """The mean over the tasks, each the mean of its metrics (the paper's GLUE average), or without tasks over the probes.

    Returns {name of this mean: value}; {} unless every part was measured.
    """
    parts = tasks or [f"probe-{name} l-1, full" for name in PROBES]
    if any(part not in values for part in parts):
        return {}
    if not tasks:
        name = "mean of probes"
    elif set(tasks) == set(SUITES["glue"]):
        name = "GLUE average"
    else:
        name = "mean of tasks"
    return {name: statistics.fmean(values[part] for part in parts)}


def at_end(by_seed: Mapping[int, Outcome], measure: str) -> dict[int, float]:
    """By seed, a measure's value at the end of the runs that have it."""
    return {seed: result.values[measure] for seed, result in by_seed.items() if measure in result.values}


def compare(sweep: str, variants: Mapping[str, Mapping[int, Outcome]], measures: Sequence[str]) -> str:
    """The sweep's table: mean ± standard deviation over seeds; in parentheses p of a paired t-test against token_drop."""
    control = variants.get("token_drop", {})
    columns, published = PAPER[sweep]
    rows, tests = [], 0
    for name, by_seed in variants.items():
        row: list[str | float | None] = [name, str(len(by_seed))]
        for measure in measures:
            values = at_end(by_seed, measure)
            cell = mean_of([*values.values()], digits=4 if measure in FINE else 2)
            notes = []
            if name != "token_drop" and measure not in (TIME, SAVED):
                p = paired_p(at_end(control, measure), values)
                if p is not None:
                    tests += 1
                    notes.append(f"p {p:.3f}")
            if 0 < len(values) < len(by_seed):
                notes.append(f"of {len(values)}")
            row.append(f"{cell} ({', '.join(notes)})" if notes else cell)
        rows.append([*row, *(f"{value:.2f}" for value in published.get(name, ()))])
    text = table(["variant", "runs", *measures, *(f"*paper: {column}*" for column in columns)], rows)
    if tests < 2:
        return text
    return f"{text}\n\n{tests} tests in this table: with Bonferroni's correction, p below {0.05 / tests:.2g} is significant."


def _origin(report: Mapping[str, Any], about: str, seeds: int) -> str:
    """The configuration and the environment, from the report of one run."""
    size = f"{report['steps']} steps of {report['global_batch']} rows of {report['seq_length']} tokens"
    environment = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    return f"Base: {about}; {size}, {seeds} seeds, {environment}."


def _legend(synthetic: bool) -> str:
    """How to read the tables."""
    sentences = [
        "Mean ± standard deviation over seeds; p: paired t-test over seeds against token_drop, not corrected for the number of "
        "comparisons.",
        "Losses in nats per masked token, probes and tasks in percent.",
        "ms_per_step is measured; if the machine was shared, flops_saved (percent of a dense step's operations) is more "
        "reliable.",
    ]
    if synthetic:
        sentences.append("Probes and tasks are synthetic tasks, not the data sets they are named after.")
    return " ".join(sentences)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key of the records once, in the order of first occurrence."""
    return list(dict.fromkeys(key for record in records for key in record))


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sweep", "variant", "seed", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _plot(sweep: str, variants: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    """A row for the loss, and one for the score if there is one: at the end, against training time, against operations."""
    from matplotlib.figure import Figure

    along = _keys(point for by_seed in variants.values() for result in by_seed.values() for point in result.points)
    rows = {LOSS: "validation loss, all tokens"}
    rows |= {name: f"{name} (%)" for name in sorted(along) if name.startswith(("GLUE", "mean"))}
    curves = {"seconds": ("training time", "seconds"), "dense_steps": ("operations", "operations, in steps of dense training")}
    figure = Figure(figsize=(16, 4.5 * len(rows)), layout="constrained")
    for (end, *axes), (measure, label) in zip(figure.subplots(len(rows), 3, squeeze=False), rows.items(), strict=True):
        _plot_end(end, variants, measure)
        end.set(ylabel=label, title=f"{sweep}: at the end, by seed")
        for axis, (x, (against, unit)) in zip(axes, curves.items(), strict=True):
            _plot_curves(axis, variants, x, measure)
            axis.set(ylabel=label, xlabel=unit, title=f"against {against}: seeds, and their mean")
        axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _plot_end(axis: Any, variants: Mapping[str, Mapping[int, Outcome]], measure: str) -> None:
    """A place per variant. Lines connect the seeds of numeric variants (lambda=0.05), and the others become horizontal lines.

    Means are over the seeds that all variants have, so that they are comparable.
    """
    ends = {name: values for name, by_seed in variants.items() if (values := at_end(by_seed, measure))}
    shared = set.intersection(*(set(values) for values in ends.values())) if ends else set()
    mean = {name: statistics.fmean(values[seed] for seed in shared) for name, values in ends.items() if shared}
    numbered = [name for name in ends if "=" in name]
    places = numbered or [*ends]
    for i, (name, values) in enumerate(ends.items()):
        if name in places:
            axis.plot([places.index(name)] * len(values), [*values.values()], "o", color=f"C{i}")
        elif shared:
            axis.axhline(mean[name], color=f"C{i}", ls="--", label=f"{name}, mean")
    if numbered and shared:
        for seed in shared:
            axis.plot(range(len(places)), [ends[name][seed] for name in places], color="0.8", lw=1, zorder=0)
        axis.plot(range(len(places)), [mean[name] for name in places], color="k", lw=1.5, label="mean")
        axis.legend(fontsize=7)
    axis.set_xticks(range(len(places)), places, rotation=20, ha="right")


def _plot_curves(axis: Any, variants: Mapping[str, Mapping[int, Outcome]], x: str, measure: str) -> None:
    """A faint curve per seed, or a point, and their mean at the steps that all seeds of a variant have."""
    for i, (name, by_seed) in enumerate(variants.items()):
        places = [{p["step"]: (p[x], p[measure]) for p in result.points if measure in p} for result in by_seed.values()]
        for place in places:
            marker = "o" if len(place) == 1 else ""  # a line of one point would not be seen
            axis.plot(*zip(*place.values(), strict=True), color=f"C{i}", lw=0.8, alpha=0.3, marker=marker)
        steps = [step for step in places[0] if all(step in place for place in places)]
        means = [[statistics.fmean(place[step][column] for place in places) for step in steps] for column in (0, 1)]
        axis.plot(*means, color=f"C{i}", marker=".", label=name)
