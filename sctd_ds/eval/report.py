"""Results in the form of the paper's tables and figures: Markdown, CSV and PNG. Missing measurements are empty cells."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sctd_ds.eval.store import read_outcome
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS

Cell = str | float | None
Scores = Mapping[str, Any]
"""The result of `analysis.probe` or `analysis.drift` for one model."""

# The paper's scores (dev, mean of 5 seeds; BERT-base and -large, 250K steps), in the order of the columns below.
PAPER_GLUE = {
    "Baseline, large": (61.3, 90.0, 92.7, 90.2, 89.9, 83.8, 86.3, 86.1, 93.5, 84.37),
    "token drop, large": (64.3, 88.0, 91.4, 89.7, 89.5, 80.1, 86.8, 86.3, 94.0, 84.04),
    "ScTD, large": (65.6, 91.4, 93.8, 90.2, 89.9, 84.5, 87.1, 86.5, 94.2, 85.63),
    "Baseline, base": (56.0, 86.8, 90.1, 89.0, 88.8, 77.6, 83.3, 83.5, 92.3, 81.11),
    "token drop, base": (54.1, 85.5, 89.6, 87.8, 87.8, 77.6, 83.4, 83.3, 91.7, 80.35),
    "ScTD, base": (58.8, 86.8, 90.5, 88.2, 88.1, 79.4, 83.8, 83.6, 91.6, 81.72),
}
PAPER_QUESTIONS = {
    "Baseline, large": (78.1, 91.1, 70.3, 72.0, 85.53, 79.16),
    "token drop, large": (79.9, 91.1, 72.8, 68.0, 86.35, 81.50),
    "ScTD, large": (79.7, 92.9, 72.8, 72.0, 86.54, 81.67),
    "Baseline, base": (74.4, 83.9, 68.1, 63.0, 81.97, 72.18),
    "token drop, base": (73.0, 83.9, 67.7, 64.0, 81.67, 72.68),
    "ScTD, base": (73.8, 87.5, 68.9, 68.0, 82.47, 72.79),
}
PAPER_SEMANTIC = {  # ScTD's row is the paper's token drop row plus the gains in its Table 6
    "Baseline, base": (30.16, 54.48, 86.80, 69.08, 60.13),
    "token drop, base": (27.49, 53.73, 85.50, 66.16, 58.22),
    "ScTD, base": (29.53, 56.32, 86.80, 68.54, 60.30),
}

# Tables of fine-tuned scores: title, columns as (task, metric), whether rows end with an average, the paper's rows.
_SEMANTIC = [("ontonotes", "f1"), ("conll03", "f1"), ("mrpc", "accuracy"), ("sick", "spearman")]
_GLUE = [(task, metric) for task in SUITES["glue"] for metric in TASKS[task].metrics]
_QUESTIONS = [(task, TASKS[task].metrics[0]) for task in (*SUITES["superglue"], *SUITES["squad"])]
TABLES: dict[str, tuple[list[tuple[str, str]], bool, Mapping[str, Sequence[float]]]] = {
    "GLUE (Table 2)": (_GLUE, True, PAPER_GLUE),
    "SuperGLUE and SQuAD (Table 3)": (_QUESTIONS, False, PAPER_QUESTIONS),
    "Semantic-intense tasks (Tables 1 and 6; the two tagging tasks are 32-shot)": (_SEMANTIC, True, PAPER_SEMANTIC),
}


def read(folder: Path) -> list[dict[str, Any]]:
    """Every outcome under `folder`/scores, as `store.remember` wrote them. Raises EvalError for a damaged one."""
    return [read_outcome(path) for path in sorted((folder / "scores").glob("*/*/*.json"))]


def write(folder: Path, models: Sequence[str], recorded: Mapping[str, list[dict[str, Any]]] | None = None) -> str:
    """Write report.md, results.csv and the figures of all outcomes of `models`, in this order; returns the Markdown.

    recorded: the records in the metrics.jsonl of the models' runs, by model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = sorted((r for r in read(folder) if r["model"] in models), key=lambda r: models.index(r["model"]))
    parts = ["# Evaluation", *_fine_tuning_parts(records, models)]
    for task in PROBES:
        parts += _probe_parts(records, task, folder)
    parts += _drift_parts(records, folder)
    validations = {model: [r for r in lines if r["event"] == "validation"] for model, lines in (recorded or {}).items()}
    if any(validations.values()):
        parts += ["## Recorded by the runs", "![](curves.png)"]
        _plot_curves(validations, folder / "curves.png")
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    _write_csv(records, folder / "results.csv")
    return text


def _fine_tuning_parts(records: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """Remarks on how the scores were obtained, and the tables of fine-tuned scores."""
    tuned = [record for record in records if record["task"] in TASKS]
    synthetic = any(record.get("data", "real") != "real" for record in records)
    parts = _remarks(tuned)
    if synthetic:
        parts.append("**The data are synthetic tasks, not the data sets they are named after**: the paper's rows are omitted.")
    for title, (columns, averaged, paper) in TABLES.items():
        if any(record["task"] == task for record in tuned for task, _ in columns):
            parts += [f"## {title}", table(*score_table(tuned, models, columns, averaged, {} if synthetic else paper))]
    return parts


def _probe_parts(records: Sequence[Mapping[str, Any]], task: str, folder: Path) -> list[str]:
    found = {record["model"]: record["scores"] for record in records if record["task"] == f"probe-{task}"}
    if not found:
        return []
    _plot_probe(found, task, folder / f"{task}.png")
    title = f"## Probing: {task} (Figures 4 and 8)"
    return [title, tables_used(found), table(*probe_table(found)), f"![]({task}.png)"]


def _drift_parts(records: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Drift of the finished models, and at the checkpoints of their runs."""
    parts = []
    drifted = [record for record in records if record["task"] == "drift"]
    finished = {record["model"]: record["scores"] for record in drifted if record["step"] is None}
    if finished:
        _plot_drift(finished, folder / "drift.png")
        parts += ["## Semantic drift (Figure 3)", tables_used(finished), table(*drift_table(finished)), "![](drift.png)"]
    history: dict[str, dict[int, Scores]] = {}
    for record in sorted((r for r in drifted if r["step"] is not None), key=lambda r: r["step"]):
        history.setdefault(record["model"], {})[record["step"]] = record["scores"]
    if history:
        _plot_history(history, folder / "drift_steps.png")
        used = tables_used({model: next(iter(steps.values())) for model, steps in history.items()})
        parts += ["## Semantic drift at the checkpoints of the runs", used, table(*history_table(history))]
        parts.append("![](drift_steps.png)")
    return parts


def _write_csv(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per number; the numbers of a list are numbered by layer."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "step", "task", "metric", "layer", "seed", "value", "device", "torch", "transformers"])
        for r in records:
            before, seed = [r["model"], r.get("step"), r["task"]], r["settings"].get("seed")
            measured_on = [r["device"], r["torch"], r["transformers"]]
            for metric, value in r["scores"].items():
                if metric == "about":
                    continue
                for layer, x in enumerate(value, 1) if isinstance(value, list) else [("", value)]:
                    writer.writerow([*before, metric, layer, seed, x, *measured_on])


def by_seed(records: Sequence[Mapping[str, Any]], model: str, task: str, metric: str) -> dict[int, float]:
    """A model's values of one metric, by seed."""
    return {r["settings"]["seed"]: r["scores"][metric] for r in records if r["model"] == model and r["task"] == task}


def mean_of(values: Sequence[float], digits: int = 2) -> str | None:
    """Mean and, for two values or more, the standard deviation."""
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def paired_p(one: Mapping[Any, float], other: Mapping[Any, float]) -> float | None:
    """p of a two-sided paired t-test over the shared seeds; None for fewer than two, or if all pairs are equal."""
    from scipy.stats import ttest_rel

    shared = sorted(set(one) & set(other))
    if len(shared) < 2 or all(one[s] == other[s] for s in shared):
        return None
    return float(ttest_rel([one[s] for s in shared], [other[s] for s in shared]).pvalue)


def averages(records: Sequence[Mapping[str, Any]], model: str, columns: Sequence[tuple[str, str]]) -> dict[int, float]:
    """By seed, the mean over tasks of the mean of each task's metrics, for seeds that have all columns."""
    metrics: dict[str, list[str]] = {}
    for task, metric in columns:
        metrics.setdefault(task, []).append(metric)
    seeds = [set(by_seed(records, model, task, metric)) for task, metric in columns]
    result = {}
    for seed in sorted(set.intersection(*seeds)):
        means = []
        for task, names in metrics.items():
            means.append(statistics.fmean(by_seed(records, model, task, name)[seed] for name in names))
        result[seed] = statistics.fmean(means)
    return result


def score_table(
    records: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    columns: Sequence[tuple[str, str]],
    averaged: bool,
    paper: Mapping[str, Sequence[float]],
) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows: mean ± standard deviation over seeds, then the paper's rows.

    Column p: a paired test of the averages against the first model's.
    """
    header = ["model", *(f"{TASKS[task].title} {metric.replace('_', ' ')}" for task, metric in columns)]
    if averaged:
        header += ["average", "p"]
    rows: list[list[Cell]] = []
    first = averages(records, models[0], columns)
    for model in models:
        row: list[Cell] = [model, *(mean_of([*by_seed(records, model, task, metric).values()]) for task, metric in columns)]
        if averaged:
            own = averages(records, model, columns)
            p = paired_p(first, own)
            row += [mean_of([*own.values()]), None if p is None else f"{p:.3f}"]
        rows.append(row)
    for name, values in paper.items():
        rows.append([f"*paper: {name}*", *(f"{value:.2f}" for value in values), *([None] if averaged else [])])
    return header, rows


def probe_table(found: Mapping[str, Scores]) -> tuple[list[str], list[list[Cell]]]:
    """A row per model, pass and pooling with the accuracy at each layer; and a row for the bag of words."""
    rows: list[list[Cell]] = []
    for model, values in found.items():
        for key in ("full_cls", "dropped_cls", "full_mean", "dropped_mean"):
            view, pooling = key.split("_")
            rows.append([model, f"{view}, {'[CLS]' if pooling == 'cls' else 'mean'}", *(f"{x:.1f}" for x in values[key])])
        rows.append([model, "bag of words", f"{values['bag_of_words']:.1f}"])
    layers = max(len(values["full_cls"]) for values in found.values())
    return ["model", "pass, pooling", *(f"layer {i}" for i in range(1, layers + 1))], rows


TEXTS = {"masked": "text: masked", "masked_and_dropped": "text: masked and dropped"}


def drift_table(found: Mapping[str, Scores]) -> tuple[list[str], list[list[Cell]]]:
    """A row per model: cosines of the texts' embeddings, if a sentence encoder was given, and of the last two layers."""
    header = ["model", *TEXTS.values(), "[CLS], layer l-1", "[CLS], layer l", "mean, layer l-1", "mean, layer l"]
    return header, [
        [model, *_cosines([*map(values.get, TEXTS), *values["layer_cls"][-2:], *values["layer_mean"][-2:]])]
        for model, values in found.items()
    ]


def history_table(history: Mapping[str, Mapping[int, Scores]]) -> tuple[list[str], list[list[Cell]]]:
    """A row per checkpoint: cosines of the texts' embeddings, if an encoder was given, and of [CLS] after each layer."""
    rows: list[list[Cell]] = [
        [model, str(step), *_cosines([*map(values.get, TEXTS), *values["layer_cls"]])]
        for model, steps in history.items()
        for step, values in steps.items()
    ]
    layers = max(map(len, rows)) - 4
    return ["model", "step", *TEXTS.values(), *(f"[CLS], layer {i}" for i in range(1, layers + 1))], rows


def _cosines(values: Sequence[float | None]) -> list[Cell]:
    return [None if x is None else f"{x:.4f}" for x in values]


def tables_used(found: Mapping[str, Scores]) -> str:
    """A sentence with each model's drop ratio and importance table."""
    source = {"learned": "the table of its own run", "estimated": "a table estimated from its losses on this text"}
    about = {model: values["about"] for model, values in found.items()}
    parts = [f"{model} {a['drop_ratio']:.0%} by {source[a['importance']]}" for model, a in about.items()]
    return f"Tokens dropped: {'; '.join(parts)}."


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table. Short rows are filled up, and None is an empty cell."""
    lines = [list(header), ["---"] * len(header)]
    lines += [["" if cell is None else str(cell) for cell in row] + [""] * (len(header) - len(row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _remarks(tuned: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = sorted({record["settings"]["seed"] for record in tuned})
    lines = [f"Fine-tuned scores in percent, mean ± standard deviation over {len(seeds)} seed(s)."] if tuned else []
    for name in ("max_steps", "max_train", "max_eval"):
        limits = sorted({record["settings"][name] for record in tuned if record["settings"][name] is not None})
        if limits:
            lines.append(f"**A trial: {name.replace('_', ' ')} {', '.join(map(str, limits))}.** Not comparable with the paper.")
    changed = sorted({r["task"] for r in tuned if r["settings"]["recipe"] != asdict(TASKS[r["task"]].recipe)})
    if changed:
        lines.append(f"Hyper-parameters other than the recipe's: {', '.join(TASKS[name].title for name in changed)}.")
    return lines


def _plot_probe(found: Mapping[str, Scores], task: str, path: Path) -> None:
    figure, axes = _figure(2)
    for axis, pooling in zip(axes, ("cls", "mean"), strict=True):
        for color, (model, values) in enumerate(found.items()):
            for view, style in (("full", "-"), ("dropped", "--")):
                _line(axis, enumerate(values[f"{view}_{pooling}"], 1), style, color=f"C{color}", label=f"{model}, {view}")
        any_model = next(iter(found.values()))
        first, last = any_model["about"]["dropped_layers"]
        axis.axhline(any_model["bag_of_words"], color="k", lw=0.8, ls=":", label="bag of words")
        axis.axvspan(first - 0.5, last + 0.5, color="0.9", zorder=0)
        axis.set(
            title=f"{task}, {'[CLS]' if pooling == 'cls' else 'mean'}",
            xlabel="layer (grey: without dropped tokens)",
            ylabel="probe accuracy (%)",
        )
    _save(figure, path)


def _plot_drift(found: Mapping[str, Scores], path: Path) -> None:
    figure, axes = _figure(2)
    for axis, key, title in zip(axes, ("layer_cls", "layer_mean"), ("[CLS]", "mean of the kept positions"), strict=True):
        for model, values in found.items():
            _line(axis, enumerate(values[key], 1), label=model)
        axis.set(title=f"Full against dropped pass, {title}", xlabel="layer", ylabel="cosine")
    _save(figure, path)


def _plot_history(history: Mapping[str, Mapping[int, Scores]], path: Path) -> None:
    """Over steps: a panel per model with the cosine between the passes' [CLS] states, a line for
    each layer in which they differ; then the curves of Figure 3, if a sentence encoder was given.
    """
    texts = any(key in values for steps in history.values() for values in steps.values() for key in TEXTS)
    figure, axes = _figure(len(history) + texts)
    for color, (axis, (model, steps)) in enumerate(zip(axes, history.items(), strict=False)):
        first, last = next(iter(steps.values()))["about"]["dropped_layers"]
        for i in range(first, last + 1):
            _line(axis, ((step, values["layer_cls"][i]) for step, values in steps.items()), label=f"layer {i + 1}")
        axis.set(title=f"Full against dropped pass, [CLS]: {model}", xlabel="step", ylabel="cosine")
        if texts:
            for key, style in (("masked", "--"), ("masked_and_dropped", "-")):
                points = [(step, values[key]) for step, values in steps.items() if key in values]
                _line(axes[-1], points, style, color=f"C{color}", label=f"{model}, {key.replace('_', ' ')}")
    if texts:
        axes[-1].set(title="Sentence embeddings, original against corrupted text", xlabel="step", ylabel="cosine")
    _save(figure, path)


def _plot_curves(validations: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """The runs' validation loss, and cosine between the passes' [CLS] states, over steps."""
    figure, axes = _figure(2)
    for axis, key in zip(axes, ("loss_full", "cosine_previous"), strict=True):
        for model, records in validations.items():
            if points := [(record["step"], record[key]) for record in records if key in record]:
                _line(axis, points, label=model)
    axes[0].set(title="Validation loss, all tokens", xlabel="step", ylabel="nats per masked token")
    axes[1].set(title="Cosine of the passes' [CLS], layer l-1", xlabel="step", ylabel="cosine")
    _save(figure, path)


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _line(axis: Any, points: Iterable[tuple[float, float]], style: str = "-", **options: Any) -> None:
    axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, **options)


def _save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
