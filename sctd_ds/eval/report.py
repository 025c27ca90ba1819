"""Results in the shapes of the paper's tables and figures: Markdown, CSV and PNG. A cell that was not measured stays empty."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sctd_ds.eval import scores
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS

Cell = str | float | None
Scores = Mapping[str, Any]
"""What `analysis` found of one model."""

# The paper's figures (dev scores, mean of 5 seeds; BERT-base and -large, 250K steps), in the order of our columns.
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
PAPER_SEMANTIC = {  # ScTD's row is the paper's token drop row with the gains of its Table 6
    "Baseline, base": (30.16, 54.48, 86.80, 69.08, 60.13),
    "token drop, base": (27.49, 53.73, 85.50, 66.16, 58.22),
    "ScTD, base": (29.53, 56.32, 86.80, 68.54, 60.30),
}

# Tables of fine-tuned scores: title, columns as (task, metric), whether an average closes the row, the paper's rows.
_SEMANTIC = [("ontonotes", "f1"), ("conll03", "f1"), ("mrpc", "accuracy"), ("sick", "spearman")]
_GLUE = [(task, metric) for task in SUITES["glue"] for metric in TASKS[task].metrics]
_QUESTIONS = [(task, TASKS[task].metrics[0]) for task in (*SUITES["superglue"], *SUITES["squad"])]
TABLES: dict[str, tuple[list[tuple[str, str]], bool, Mapping[str, Sequence[float]]]] = {
    "GLUE (Table 2)": (_GLUE, True, PAPER_GLUE),
    "SuperGLUE and SQuAD (Table 3)": (_QUESTIONS, False, PAPER_QUESTIONS),
    "Semantic-intense tasks (Tables 1 and 6; the two tagging tasks are 32-shot)": (_SEMANTIC, True, PAPER_SEMANTIC),
}


def read(folder: Path) -> list[dict[str, Any]]:
    """Every outcome under `folder`/scores, as `store.remember` wrote them."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "scores").glob("*/*/*.json"))]


def write(folder: Path, models: Sequence[str], recorded: Mapping[str, list[dict[str, Any]]] | None = None) -> str:
    """Write report.md, results.csv and the figures of everything measured for `models`, in this order; returns the Markdown.

    recorded: what the models' runs wrote to metrics.jsonl, by model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = sorted((r for r in read(folder) if r["model"] in models), key=lambda r: models.index(r["model"]))
    tuned = [record for record in records if record["task"] in TASKS]
    synthetic = any(record.get("data") == "twins" for record in records)
    parts = ["# Evaluation", *_remarks(tuned)]
    if synthetic:
        parts.append("**The data are synthetic twins, not the data sets they are named after**: the paper's rows are left out.")
    for title, (columns, averaged, paper) in TABLES.items():
        if any(record["task"] == task for record in tuned for task, _ in columns):
            parts += [f"## {title}", table(*score_table(tuned, models, columns, averaged, {} if synthetic else paper))]
    for task in PROBES:
        if found := {r["model"]: r["scores"] for r in records if r["task"] == f"probe-{task}"}:
            parts += [f"## Probing: {task} (Figures 4 and 8)", tables_used(found)]
            parts += [table(*probe_table(found)), f"![]({task}.png)"]
            _plot_probe(found, task, folder / f"{task}.png")
    drifted = [record for record in records if record["task"] == "drift"]
    if found := {r["model"]: r["scores"] for r in drifted if r["step"] is None}:
        parts += ["## Semantic drift (Figure 3)", tables_used(found), table(*drift_table(found)), "![](drift.png)"]
        _plot_drift(found, folder / "drift.png")
    history: dict[str, dict[int, Scores]] = {}
    for record in sorted((r for r in drifted if r["step"] is not None), key=lambda r: r["step"]):
        history.setdefault(record["model"], {})[record["step"]] = record["scores"]
    if history:
        told = tables_used({model: next(iter(steps.values())) for model, steps in history.items()})
        parts += ["## Semantic drift at the checkpoints of the runs", told, table(*history_table(history))]
        parts.append("![](drift_steps.png)")
        _plot_history(history, folder / "drift_steps.png")
    validations = {model: [r for r in lines if r["event"] == "validation"] for model, lines in (recorded or {}).items()}
    if any(validations.values()):
        parts += ["## As the runs recorded it", "![](curves.png)"]
        _plot_curves(validations, folder / "curves.png")
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    _write_csv(records, folder / "results.csv")
    return text


def _write_csv(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line per number; those of a list are numbered by layer."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "step", "task", "metric", "layer", "seed", "value", "device", "torch", "transformers"])
        for r in records:
            for metric, value in r["scores"].items():
                if metric == "about":
                    continue
                for layer, x in enumerate(value, 1) if isinstance(value, list) else [("", value)]:
                    writer.writerow([r["model"], r.get("step"), r["task"], metric, layer, r["settings"].get("seed"), x,
                                     r["device"], r["torch"], r["transformers"]])  # fmt: skip


def by_seed(records: Sequence[Mapping[str, Any]], model: str, task: str, metric: str) -> dict[int, float]:
    """Values of one metric by seed."""
    return {r["settings"]["seed"]: r["scores"][metric] for r in records if r["model"] == model and r["task"] == task}


def mean_of(values: Sequence[float], digits: int = 2) -> str | None:
    """Mean and, with two values or more, their standard deviation."""
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def paired_p(one: Mapping[Any, float], other: Mapping[Any, float]) -> float | None:
    """p of a two-sided paired t-test over the seeds both have; None with fewer than two, or when no pair differs."""
    from scipy.stats import ttest_rel

    shared = sorted(set(one) & set(other))
    if len(shared) < 2 or all(one[s] == other[s] for s in shared):
        return None
    return float(ttest_rel([one[s] for s in shared], [other[s] for s in shared]).pvalue)


def averages(records: Sequence[Mapping[str, Any]], model: str, columns: Sequence[tuple[str, str]]) -> dict[int, float]:
    """By seed, the mean over tasks of the mean of each task's metrics; seeds without every column are left out."""
    metrics: dict[str, list[str]] = {}
    for task, metric in columns:
        metrics.setdefault(task, []).append(metric)
    seeds = [set(by_seed(records, model, task, metric)) for task, metric in columns]
    result = {}
    for seed in sorted(set.intersection(*seeds)):
        values = {task: {m: by_seed(records, model, task, m)[seed] for m in names} for task, names in metrics.items()}
        mean = scores.average(values, metrics)
        assert mean is not None
        result[seed] = mean
    return result


def score_table(records: Sequence[Mapping[str, Any]], models: Sequence[str], columns: Sequence[tuple[str, str]],
                averaged: bool, paper: Mapping[str, Sequence[float]]) -> tuple[list[str], list[list[Cell]]]:  # fmt: skip
    """Header and rows: mean ± standard deviation over seeds, the paper's rows below ours.

    p: of a paired test of the averages against the first model's.
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
    """A row per model, pass and pooling: the accuracy at each layer; and one for the bag of words."""
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
    """A row per model: cosines of the texts' embeddings, where an encoder was given, and of the last two layers."""
    header = ["model", *TEXTS.values(), "[CLS], layer l-1", "[CLS], layer l", "mean, layer l-1", "mean, layer l"]
    return header, [
        [model, *_cosines([*map(values.get, TEXTS), *values["layer_cls"][-2:], *values["layer_mean"][-2:]])]
        for model, values in found.items()
    ]


def history_table(history: Mapping[str, Mapping[int, Scores]]) -> tuple[list[str], list[list[Cell]]]:
    """A row per checkpoint: cosines of the texts' embeddings, where an encoder was given, and of [CLS] after each layer."""
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
    """A sentence: by which importance table each model dropped which share of its tokens."""
    source = {"learned": "the table of its own run", "estimated": "a table estimated from its losses on this text"}
    about = {model: values["about"] for model, values in found.items()}
    said = [f"{model} {a['drop_ratio']:.0%} by {source[a['importance']]}" for model, a in about.items()]
    return f"Tokens dropped: {'; '.join(said)}."


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; rows may be short, and None is an empty cell."""
    lines = [list(header), ["---"] * len(header)]
    lines += [["" if cell is None else str(cell) for cell in row] + [""] * (len(header) - len(row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _remarks(tuned: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = sorted({record["settings"]["seed"] for record in tuned})
    lines = [f"Fine-tuned scores in percent, mean ± standard deviation over {len(seeds)} seed(s)."] if tuned else []
    for name in ("max_steps", "max_train", "max_eval"):
        cut = sorted({record["settings"][name] for record in tuned if record["settings"][name] is not None})
        if cut:
            lines.append(f"**A trial: {name.replace('_', ' ')} {', '.join(map(str, cut))}.** Not comparable with the paper.")
    changed = sorted(
        {r["task"] for r in tuned if any(r["settings"]["recipe"][k] != v for k, v in vars(TASKS[r["task"]].recipe).items())}
    )
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
        axis.set(title=f"{task}, {'[CLS]' if pooling == 'cls' else 'mean'}", xlabel="layer (grey: without dropped tokens)",
                 ylabel="probe accuracy (%)")  # fmt: skip
    _save(figure, path)


def _plot_drift(found: Mapping[str, Scores], path: Path) -> None:
    figure, axes = _figure(2)
    for axis, key, title in zip(axes, ("layer_cls", "layer_mean"), ("[CLS]", "mean of the kept positions"), strict=True):
        for model, values in found.items():
            _line(axis, enumerate(values[key], 1), label=model)
        axis.set(title=f"Full against dropped pass, {title}", xlabel="layer", ylabel="cosine")
    _save(figure, path)


def _plot_history(history: Mapping[str, Mapping[int, Scores]], path: Path) -> None:
    """Over the steps: the cosine of the passes' [CLS], a panel per model and a line for each layer in which they differ; then,
    where a sentence encoder was given, Figure 3's curves.
    """
    texts = any(key in values for steps in history.values() for values in steps.values() for key in TEXTS)
    figure, axes = _figure(len(history) + texts)
    for color, (axis, (model, steps)) in enumerate(zip(axes, history.items(), strict=False)):
        first, last = next(iter(steps.values()))["about"]["dropped_layers"]
        for i in range(first, last + 1):
            _line(axis, ((step, values["layer_cls"][i]) for step, values in steps.items()), label=f"layer {i + 1}")
        axis.set(title=f"Full against dropped pass, [CLS]: {model}", xlabel="step", ylabel="cosine")
        for key, style in zip(TEXTS, ("--", "-"), strict=True) if texts else ():
            points = [(step, values[key]) for step, values in steps.items() if key in values]
            _line(axes[-1], points, style, color=f"C{color}", label=f"{model}, {key.replace('_', ' ')}")
    if texts:
        axes[-1].set(title="Sentence embeddings, original against corrupted text", xlabel="step", ylabel="cosine")
    _save(figure, path)


def _plot_curves(validations: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Validation loss, and the cosine between the passes' [CLS] states, over the steps, as the runs recorded them."""
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
