"""What the runs of an ablation show: results.csv, curves.csv, tables.md beside the paper's figures, and a figure per sweep.

Everything is read from the folders that `benchmarks.ablate` fills, below its --out: DIR/runs/RUN, with what `pretrain.py` wrote
of a run, and DIR/eval/scores, with what the evaluation found. A run that is not finished is left out.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd_ds.eval.report import mean_of, paired_p, table
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS
from sctd_ds.method.flops import Shape, part_flops
from sctd_ds.run import metrics
from sctd_ds.run.models import model_config
from sctd_ds.run.settings import RunConfig

# The paper's results by sweep: columns, and their values by variant. Figure 7 has no numbers.
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
    "objective": "Terms beside the dropped pass's own loss: L_MLM, the loss on the full pass; L_SCl, the KL of layer l-1; "
    "L_SCg, that of layer l; sctd has all three. A row without L_MLM is the released code's objective: the dropped pass's loss "
    "counts whole instead of half, and the KL's gradient reaches the full pass as well, where the rows with L_MLM stop it.",
}

LOSS, TIME, SAVED = "loss_full", "ms_per_step", "flops_saved"
FINE = (LOSS, "loss_drop", "cosine_previous")  # measures whose third and fourth digits matter
LAYERS = "pretrain.model.num_hidden_layers"  # the one setting of the sweeps that changes what a dense step costs
BEGAN, REPORT = "began.json", "report.json"  # in a run's folder: what it was started with, and what it reported at its end


@dataclass(frozen=True)
class Run:
    """One pretraining. changes: what it sets beside the base configuration and the seed."""

    changes: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        said = [f"{key.split('.')[-1]}-{value}" for key, value in self.changes] or ["base"]
        return "_".join([*said, f"seed-{self.seed}"])

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.name

    def overrides(self) -> list[str]:
        pairs = [*self.changes, ("pretrain.seed", self.seed)]
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]


Runs = Mapping[str, Mapping[str, Sequence[Run]]]
"""By sweep and variant: a run per seed, the same seeds for all."""


def in_order(runs: Runs) -> list[Run]:
    """Every run once: sweep by sweep, and in each all variants of a seed before the next seed, so that a stop leaves pairs."""
    by_seed = [of for variants in runs.values() for of in zip(*variants.values(), strict=True)]
    return list(dict.fromkeys(run for of in by_seed for run in of))


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached: values at its end by measure, and what was measured along it."""

    values: dict[str, float]
    points: list[dict[str, float]]
    """By step: "step", "seconds" of training until then, its "dense_steps" (operations, in dense steps), and measures.

    Seconds are of steps that take the median time of their mode: a machine's stalls are no property of a method.
    """


def write(out: Path, runs: Runs, base: RunConfig, *, about: str, tasks: Sequence[str] = (), synthetic: bool = False) -> str:
    """Write results.csv, curves.csv, tables.md and the figures of the runs that are finished; returns the Markdown.

    base: the configuration that the runs change. about: what to call it. tasks: those that make the score; none: the probes.
    synthetic: whether probes and tasks are synthetic twins.
    """
    planned = in_order(runs)
    reports = {run: _json(run.folder(out) / REPORT) for run in planned if (run.folder(out) / REPORT).is_file()}
    finished = {run: outcome(run, report, base, out, tasks) for run, report in reports.items()}
    measures = _keys(reached.values for reached in finished.values())
    seeds = len({run.seed for run in planned})
    example = next(iter(reports.values()), None)
    head = [_origin(example, about, seeds), _legend(synthetic)] if example else ["No run is finished."]
    parts = ["# Ablations", *head]
    results, curves = [], []
    for sweep, variants in runs.items():
        done = {variant: [run for run in of if run in finished] for variant, of in variants.items()}
        done = {variant: of for variant, of in done.items() if of}
        for variant, of in done.items():
            for run in of:
                place, reached = {"sweep": sweep, "variant": variant, "seed": run.seed}, finished[run]
                results.append({**place, "commit": _json(run.folder(out) / BEGAN)["commit"], **reached.values})
                curves += [{**place, **point} for point in reached.points]
        outcomes = {variant: {run.seed: finished[run] for run in of} for variant, of in done.items()}
        parts += [f"## {TITLE[sweep]}", *([NOTE[sweep]] if sweep in NOTE else []), compare(sweep, outcomes, measures)]
        if outcomes:
            _plot(sweep, outcomes, out / f"{sweep}.png")
            parts.append(f"![]({sweep}.png)")
    _write_csv(out / "results.csv", ["commit", *measures], results)
    _write_csv(out / "curves.csv", _keys(point for reached in finished.values() for point in reached.points), curves)
    text = "\n\n".join(parts) + "\n"
    (out / "tables.md").write_text(text, encoding="utf-8")
    return text


def outcome(run: Run, report: Mapping[str, Any], base: RunConfig, out: Path, tasks: Sequence[str]) -> Outcome:
    """What is known of a finished run; report: its report.json."""
    cost = operations(run, report, base)
    validation, found = report["validation"], measured(run.name, out)
    values = {key: validation[key] for key in FINE if key in validation}
    values[TIME] = report["global_batch"] / report["samples_per_s"] * 1000
    values[SAVED] = 100 * (1 - cost)
    values |= score(found, tasks) | found
    records = metrics.read(run.folder(out) / "metrics.jsonl")
    by_mode: dict[str, list[float]] = {}
    for record in records:
        if record["event"] == "train":
            by_mode.setdefault(record["mode"], []).append(record["step_ms"])
    usual = {mode: statistics.median(ms) for mode, ms in by_mode.items()}
    seconds, points = 0.0, []
    for record in records:
        if record["event"] == "train":
            seconds += usual[record["mode"]] / 1000
        else:
            step = record["step"]
            reached = found if step == report["steps"] else measured(f"{run.name}@{step}", out)
            point = {"step": step, "seconds": seconds, "dense_steps": step * cost, LOSS: record[LOSS]}
            points.append(point | score(reached, tasks))
    return Outcome(values, points)


def operations(run: Run, report: Mapping[str, Any], base: RunConfig) -> float:
    """What the run's mean step costs, in dense steps of the base's model, all of whose layers count.

    The base's dense step is the run's own and the layers that the run lacks: no other run need be finished.
    """
    sizes = model_config(base.pretrain)
    layers, length = sizes.num_hidden_layers, base.pretrain.seq_length
    # Vocabulary and labels cost in the head and the last layer, which every run has: they say nothing of a whole layer.
    shape = Shape(layers, sizes.hidden_size, sizes.intermediate_size, vocabulary=0, length=length, labels=0)
    whole_layer = part_flops(shape, base.sctd, "dense")[0]
    lacking = layers - dict(run.changes).get(LAYERS, layers)
    dense = report["flops_per_sequence"]["dense"]
    return (1 - report["flops_saved"]) * dense / (dense + lacking * whole_layer)


def measured(name: str, out: Path) -> dict[str, float]:
    """What the evaluation found of a model, by measure, in percent."""
    values: dict[str, float] = {}
    for path in sorted((out / "eval" / "scores" / name).glob("*/*.json")):
        record = _json(path)
        task, found = record["task"], record["scores"]
        if task.startswith("probe-"):
            # The layer below the last is where dropping shows most (Section 2.2 of the paper).
            values[f"{task} l-1, full"] = found["full_mean"][-2]
            values[f"{task} l-1, dropped"] = found["dropped_mean"][-2]
            values[f"{task} bag of words"] = found["bag_of_words"]
        else:
            values[task] = statistics.fmean(found[metric] for metric in TASKS[task].metrics)
    return values


def score(values: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """The mean over the tasks, each the mean of its metrics (the paper's GLUE average), else over the probes, named so.

    Empty unless every part was measured.
    """
    parts = tasks or [f"probe-{name} l-1, full" for name in PROBES]
    if any(part not in values for part in parts):
        return {}
    of_tasks = "GLUE average" if set(tasks) == set(SUITES["glue"]) else "mean of tasks"
    return {of_tasks if tasks else "mean of probes": statistics.fmean(values[part] for part in parts)}


def at_end(by_seed: Mapping[int, Outcome], measure: str) -> dict[int, float]:
    """A measure's value at the end of the runs that have it, by seed."""
    return {seed: reached.values[measure] for seed, reached in by_seed.items() if measure in reached.values}


def compare(sweep: str, variants: Mapping[str, Mapping[int, Outcome]], measures: Sequence[str]) -> str:
    """The sweep's table: mean ± standard deviation over seeds; in brackets p of a paired t-test against token_drop."""
    control = variants.get("token_drop", {})
    columns, published = PAPER[sweep]
    rows, tests = [], 0
    for name, by_seed in variants.items():
        row: list[str | float | None] = [name, str(len(by_seed))]
        for measure in measures:
            values = at_end(by_seed, measure)
            cell = mean_of([*values.values()], digits=4 if measure in FINE else 2)
            tested = name != "token_drop" and measure not in (TIME, SAVED)
            p = paired_p(at_end(control, measure), values) if tested else None
            tests += p is not None
            notes = [f"p {p:.3f}"] if p is not None else []
            notes += [f"of {len(values)}"] if 0 < len(values) < len(by_seed) else []
            row.append(f"{cell} ({', '.join(notes)})" if notes else cell)
        rows.append([*row, *(f"{value:.2f}" for value in published.get(name, ()))])
    text = table(["variant", "runs", *measures, *(f"*paper: {column}*" for column in columns)], rows)
    if tests < 2:
        return text
    corrected = f"after Bonferroni's correction for them, p below {0.05 / tests:.2g} counts"
    return f"{text}\n\n{tests} tests stand in this table; {corrected}."


def _origin(report: Mapping[str, Any], about: str, seeds: int) -> str:
    """What was run, and where: by the report of one run."""
    size = f"{report['steps']} steps of {report['global_batch']} rows of {report['seq_length']} tokens"
    environment = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    return f"Base: {about}; {size}, {seeds} seeds, {environment}."


def _legend(synthetic: bool) -> str:
    """How to read the tables."""
    sentences = [
        "Mean ± standard deviation over seeds; p: paired t-test over seeds against token_drop, not corrected for the number of "
        "comparisons.",
        "Losses in nats per masked token, probes and tasks in percent.",
        "ms_per_step is what the runs took; where the machine was shared, flops_saved (percent of a dense step's operations) "
        "says more.",
    ]
    if synthetic:
        sentences.append("Probes and tasks are synthetic twins, not the data sets they are named after.")
    return " ".join(sentences)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key of the records once, as they first come."""
    return list(dict.fromkeys(key for record in records for key in record))


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sweep", "variant", "seed", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _plot(sweep: str, variants: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    """A row for the loss, and one for the score where there is one: at the end, against training time, against operations."""
    from matplotlib.figure import Figure

    along = _keys(point for by_seed in variants.values() for reached in by_seed.values() for point in reached.points)
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
    """A place per variant. Variants of a number (lambda=0.05) are joined seed by seed, and the others become lines.

    Means are over the seeds that all variants have, so that they compare like with like.
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
    """A faint curve per seed, and the mean of the steps that all of a variant's seeds have."""
    for i, (name, by_seed) in enumerate(variants.items()):
        places = [{p["step"]: (p[x], p[measure]) for p in reached.points if measure in p} for reached in by_seed.values()]
        for place in places:
            axis.plot(*zip(*place.values(), strict=True), color=f"C{i}", lw=0.8, alpha=0.3)
        steps = [step for step in places[0] if all(step in place for place in places)]
        means = [[statistics.fmean(place[step][column] for place in places) for step in steps] for column in (0, 1)]
        axis.plot(*means, color=f"C{i}", marker=".", label=name)
