"""The paper's ablations at any size: objectives (Table 4), lambda (Figure 7), Fi (Table 5), method (Table 2, Figure 6).

    python -m benchmarks.ablate --config ds_configs/tiny.json --out runs/ablation --sweep method --seeds 3

Each variant and seed is an ordinary `pretrain.py` run from one base configuration. What is finished is kept: the same command
continues, more sweeps or seeds add to it, and runs that two sweeps share are run once. Every run is judged by its validation
loss, with all tokens and with dropping, by its step time, and, with --data-dir, by a score: the mean over --tasks, each after
fine-tuning, or, without tasks, over the probes. --points N keeps N checkpoints along each run of the method sweep and scores
them all, which is Figure 6. results.csv has a line per run, curves.csv one per validation and scored checkpoint, tables.md the
paper's tables with ours beside, and a figure each. What was not run is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

import sctd_ds
from benchmarks.harness import ROOT, commit
from sctd_ds import metrics
from sctd_ds.config import ConfigError, RunConfig, differences, load, model_arguments
from sctd_ds.eval import EvalError
from sctd_ds.eval.store import Model
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS

# The paper's results by sweep: columns, and their values by variant. Figure 7 has no numbers.
PAPER: dict[str, tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    "method": (("GLUE",), {"dense": (81.11,), "token_drop": (80.35,), "sctd": (81.72,)}),
    "objective": (("GLUE", "SuperGLUE", "SQuAD"), {
        "dense": (77.73, 69.11, 74.15), "token_drop": (76.58, 68.01, 72.28), "L_MLM": (78.30, 68.73, 75.56),
        "L_SCl": (78.06, 69.49, 75.66), "L_SCg": (79.27, 68.64, 75.80), "L_MLM+L_SCl": (78.51, 69.64, 75.51),
        "L_MLM+L_SCg": (79.26, 69.32, 75.59), "L_SCl+L_SCg": (79.36, 69.89, 75.91), "sctd": (79.58, 70.29, 76.01)}),
    "interval": (("time saved (%)", "GLUE", "SQuAD"), {
        "dense": (0.0, 77.73, 74.15), "token_drop": (21.5, 76.58, 72.28), "Fi=5": (4.9, 78.96, 75.49),
        "Fi=10": (13.8, 79.58, 75.80), "Fi=20": (18.1, 78.45, 75.74), "Fi=50": (20.5, 79.01, 75.04)}),
    "lambda": ((), {}),
}  # fmt: skip
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

LAYERS = "pretrain.model.num_hidden_layers"

# By sweep, what each variant sets beside the base configuration. Variants of equal settings are one run.
# A function gets the base's number of layers.
# Table 4: L_SCg is the KL of layer l, L_SCl that of layer l-1. A row without L_MLM has no loss on the full pass, which is the
# released code's objective; there the full pass, which learns nothing else, also gets the KL's gradient.
_BASELINES = {"dense": {"sctd.method": "dense"}, "token_drop": {"sctd.method": "token_drop"}}
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "method": {
        **_BASELINES,
        "sctd": {},
        "sctd spread": {"sctd.align_schedule": "spread"},
        "random drop": {"sctd.method": "token_drop", "sctd.importance": "random"},
        "fewer layers": {"sctd.method": "dense", LAYERS: lambda layers: layers - layers // 4},  # about token_drop's operations
    },
    "objective": {
        **_BASELINES,
        "L_MLM": {"sctd.kl_weight": 0.0},
        "L_SCl": {"sctd.objective": "released", "sctd.kl_layers": "previous"},
        "L_SCg": {"sctd.objective": "released", "sctd.kl_layers": "last"},
        "L_MLM+L_SCl": {"sctd.kl_layers": "previous"},
        "L_MLM+L_SCg": {"sctd.kl_layers": "last"},
        "L_SCl+L_SCg": {"sctd.objective": "released"},
        "sctd": {},
    },
    "interval": {**_BASELINES, **{f"Fi={fi}": {"sctd.interval": fi} for fi in (5, 10, 20, 50)}},
    "lambda": {**_BASELINES, **{f"lambda={x:g}": {"sctd.kl_weight": x} for x in (0.0, 0.01, 0.05, 0.25, 0.5)}},
}
LOSS, TIME, SAVED = "loss_full", "ms_per_step", "flops_saved"
FINE = (LOSS, "loss_drop", "cosine_previous")  # measures whose third and fourth digits matter
BEGAN = "began.json"  # what a run was started with


@dataclass(frozen=True)
class Run:
    """One pretraining. changes: what it sets beside the base configuration, seed included."""

    changes: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        said = [f"{key.split('.')[-1]}-{value}" for key, value in self.changes] or ["base"]
        return "_".join([*said, f"seed-{self.seed}"])

    def overrides(self) -> list[str]:
        pairs = [*self.changes, ("pretrain.seed", self.seed)]
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="base configuration; its method must be sctd")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs, results.csv, tables.md and figures")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=["method"])
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some variants of the sweeps only")
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="for every run")
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="text or built data, for every run")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="evaluation data: probes every run's model, and see --tasks"
    )
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), default=[], metavar="A,B", help="fine-tune on these as well"
    )
    parser.add_argument("--points", type=int, default=1, metavar="N", help="score every run of the method "
                        "sweep up to N times, evenly spaced, the last time at its end; these models are kept")  # fmt: skip
    parser.add_argument(
        "--eval-arguments", default="", metavar="TEXT", help='for sctd_ds.eval: "--epochs 3 --learning-rate 1e-3"'
    )
    parser.add_argument("--gpus", type=int, default=1, help="ranks of each run (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs = plan(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    timed = {run for of in runs.get("method", {}).values() for run in of} if options.points > 1 else set()
    with tqdm(in_order(runs, options.seeds), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for run in bar:
            bar.set_description(run.name)
            pretrain(run, options)
            if options.data_dir:
                evaluate(run, options, run in timed)
    print(write(options.out, runs, options))
    return 0


def plan(options: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """The runs by sweep and variant, each configuration checked before the first run starts. Raises ConfigError."""
    base = load(options.config, options.overrides, options.gpus)
    if options.points < 1 or options.points > base.pretrain.steps:
        raise ConfigError(f"--points {options.points}: expected 1 to {base.pretrain.steps}, the steps of a run")
    if options.points > 1 and (not options.data_dir or base.pretrain.stages > 1):
        raise ConfigError(f"--points {options.points}: needs --data-dir, to score by, and runs without pipeline stages")
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f"--tasks {','.join(unknown)}: unknown; there are {', '.join(TASKS)}")
    if options.tasks and not options.data_dir:
        raise ConfigError(f"--tasks {','.join(options.tasks)}: needs --data-dir, the folder with the tasks' data")
    if base.sctd.method != "sctd":
        raise ConfigError(f'{options.config}: sctd.method is "{base.sctd.method}"; the base of an ablation must be "sctd"')
    settings, layers = base.flat(), model_arguments(base.pretrain).get("num_hidden_layers", 12)
    runs: dict[str, dict[str, list[Run]]] = {}
    for sweep in options.sweep:
        known = SWEEPS[sweep]
        for variant, changes in known.items():
            if options.variants and variant not in options.variants:
                continue
            changes = {key: value(layers) if callable(value) else value for key, value in changes.items()}
            # What the base sets already is no change: so "Fi=10", "lambda=0.05" and "sctd" are one run.
            real = tuple(sorted((key, value) for key, value in changes.items() if settings.get(key) != value))
            of = [Run(real, seed) for seed in range(options.seeds)]
            configured(of[0], options)
            runs.setdefault(sweep, {})[variant] = of
    missing = set(options.variants or ()) - {variant for variants in runs.values() for variant in variants}
    if missing:
        raise ConfigError(f"--variants {', '.join(sorted(missing))}: not in the sweeps {', '.join(options.sweep)}")
    return runs


def in_order(runs: Mapping[str, Mapping[str, Sequence[Run]]], seeds: int) -> list[Run]:
    """Every run once: sweep by sweep, and in each all variants of a seed before the next seed, so that a stop leaves pairs."""
    return list(dict.fromkeys(of[seed] for variants in runs.values() for seed in range(seeds) for of in variants.values()))


def configured(run: Run, options: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """The run's configuration, and what makes it of the base file. With --points, validations and checkpoints stand there."""
    overrides = [*options.overrides, *run.overrides()]
    if options.points > 1:
        steps = load(options.config, overrides, options.gpus).pretrain.steps
        every = math.ceil(steps / options.points)
        overrides += [f"pretrain.{name}={every}" for name in ("save_every", "validation_every")]
        overrides.append(f"pretrain.keep_last={steps}")  # all, and those of interruptions
    return load(options.config, overrides, options.gpus), overrides


def pretrain(run: Run, options: argparse.Namespace) -> None:
    """Run `pretrain.py`, or continue it, or do nothing when it is finished. Its output goes to log.txt of the run."""
    folder = options.out / "runs" / run.name
    config, overrides = configured(run, options)
    settings = config.flat()
    settings = {"data": options.data, **{key: settings[key] for key in settings if key != "pretrain.output"}}
    began = folder / BEGAN
    if began.is_file():
        before = json.loads(began.read_text(encoding="utf-8"))["settings"]
        changed = differences(before, json.loads(json.dumps(settings)))
        if changed:
            raise SystemExit(f"{folder}: begun with other settings ({'; '.join(changed)}); choose another --out, or delete it")
    if (folder / "report.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    began.write_text(json.dumps({"commit": commit(), "settings": settings}, indent=1), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(options.gpus), "--master_port", str(port),
               str(ROOT / "pretrain.py"), "--deepspeed_config", str(options.config), "--output", str(folder)]  # fmt: skip
    command += [part for item in overrides for part in ("--set", item)]
    command += ["--data", *options.data] if options.data else []
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
        )
    if status.returncode or not (folder / "report.json").is_file():
        raise SystemExit(f"{run.name}: pretrain.py ended with status {status.returncode}; see {folder / 'log.txt'}")


def evaluate(run: Run, options: argparse.Namespace, timed: bool) -> None:
    """Probe and fine-tune the run's model, and those of its points if timed; sctd_ds.eval keeps what was done before."""
    from sctd_ds.eval.__main__ import main as evaluation

    folder = options.out / "runs" / run.name
    models, (config, _) = [f"{run.name}={folder}"], configured(run, options)
    # Probes look at the dropped pass, too, for which a shallower dense model may be too shallow.
    tasks = [*(PROBES if model_arguments(config.pretrain).get("num_hidden_layers", 12) >= 4 else ()), *options.tasks]
    if not tasks:
        return
    if timed:
        for step in range(config.pretrain.save_every, config.pretrain.steps, config.pretrain.save_every):
            models.append(f"{run.name}@{step}={export_point(folder, step)}")
    command = [*models, "--data-dir", str(options.data_dir), "--out", str(options.out / "eval"), "--seeds", "1",
               "--tasks", ",".join(tasks), *options.eval_arguments.split()]  # fmt: skip
    with (folder / "eval.md").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        status = evaluation(command)
    if status:
        raise SystemExit(f"{run.name}: evaluation ended with status {status}")


def export_point(folder: Path, step: int) -> Path:
    """A finished run's checkpoint as a Hugging Face folder, RUN/points/step_...; takes the checkpoint's place.

    The weights are those that the forward pass used: in a 16-bit run they are rounded, unlike those of RUN/model.
    """
    name = f"step_{step:08d}"
    target, checkpoint = folder / "points" / name, folder / "checkpoints" / name
    if target.is_dir():
        return target
    try:
        weights, learned = Model(folder.name, str(folder / "model"), folder, checkpoint).read_checkpoint()
    except (EvalError, OSError) as error:
        raise SystemExit(f"--points needs the checkpoints of a run that began with it: {error}") from error
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder / "model")
    model.load_state_dict(weights)
    if learned:  # a converted model's table is exported with it
        sctd_ds.convert(model, sctd_ds.ScTDConfig(drop_ratio=learned.drop_ratio, keep_token_ids=[]))
        sctd_ds.importance(model).load_state_dict({"scores": learned.scores})
    target.parent.mkdir(exist_ok=True)
    sctd_ds.export(model, target, transformers.AutoTokenizer.from_pretrained(folder / "model"))
    shutil.rmtree(checkpoint)
    return target


def measured(name: str, out: Path) -> dict[str, float]:
    """What the evaluation found of a model, by measure, in percent."""
    values: dict[str, float] = {}
    for path in sorted((out / "eval" / "scores" / name).glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
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


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached: values at its end by measure, and what was measured along it."""

    values: dict[str, float]
    points: list[dict[str, float]]
    """By step: "step", "seconds" of training until then, its "dense_steps" (operations, in dense steps), and measures.

    Seconds are of steps that take the median time of their kind: a machine's stalls are no property of a method.
    """


def report_of(run: Run, out: Path) -> dict[str, Any] | None:
    """The report that `pretrain.py` wrote of a run; None for one that is not finished."""
    file = out / "runs" / run.name / "report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def outcome(run: Run, report: Mapping[str, Any], dense_flops: float, options: argparse.Namespace) -> Outcome:
    """What is known of a finished run. dense_flops: operations of one sequence in a dense step of the base's depth."""
    out, tasks = options.out, options.tasks
    cost = (1 - report["flops_saved"]) * report["flops_per_sequence"]["dense"] / dense_flops
    values: dict[str, float] = {
        key: report["validation"][key] for key in (LOSS, "loss_drop", "cosine_previous") if key in report["validation"]
    }
    values[TIME] = report["global_batch"] / report["samples_per_s"] * 1000
    values[SAVED] = 100 * (1 - cost)
    found = measured(run.name, out)
    values |= score(found, tasks) | found
    records = metrics.read(out / "runs" / run.name / "metrics.jsonl")
    by_kind: dict[str, list[float]] = {}
    for record in records:
        if record["event"] == "train":
            by_kind.setdefault(record["kind"], []).append(record["step_ms"])
    usual = {kind: statistics.median(ms) for kind, ms in by_kind.items()}
    seconds, points = 0.0, []
    for record in records:
        if record["event"] == "train":
            seconds += usual[record["kind"]] / 1000
        else:
            step = record["step"]
            reached = found if step == report["steps"] else measured(f"{run.name}@{step}", out)
            points.append({"step": step, "seconds": seconds, "dense_steps": step * cost,
                           LOSS: record[LOSS], **score(reached, tasks)})  # fmt: skip
    return Outcome(values, points)


def write(out: Path, runs: Mapping[str, Mapping[str, Sequence[Run]]], options: argparse.Namespace) -> str:
    """Write results.csv, curves.csv, tables.md and the figures of the runs that are finished; returns the Markdown."""
    found = {run: report_of(run, out) for run in in_order(runs, options.seeds)}
    reports = {run: report for run, report in found.items() if report is not None}
    dense_flops = max((report["flops_per_sequence"]["dense"] for report in reports.values()), default=0.0)  # no run is deeper
    finished = {run: outcome(run, report, dense_flops, options) for run, report in reports.items()}
    measures = list(dict.fromkeys(name for reached in finished.values() for name in reached.values))
    along = list(dict.fromkeys(name for reached in finished.values() for point in reached.points for name in point))
    lines, curves = [], []
    for sweep, variants in runs.items():
        for variant, of in variants.items():
            for run in (run for run in of if run in finished):
                began = json.loads((out / "runs" / run.name / BEGAN).read_text(encoding="utf-8"))
                about, reached = {"sweep": sweep, "variant": variant, "seed": run.seed}, finished[run]
                lines.append({**about, "commit": began["commit"], **reached.values})
                curves += [{**about, **point} for point in reached.points]
    for name, columns, rows in (("results", ["commit", *measures], lines), ("curves", along, curves)):
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["sweep", "variant", "seed", *columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    parts = ["# Ablations", _origin(next(iter(finished), None), out, options)]
    for sweep, variants in runs.items():
        done = {name: {run.seed: finished[run] for run in of if run in finished} for name, of in variants.items()}
        done = {name: by_seed for name, by_seed in done.items() if by_seed}
        parts += [f"## {TITLE[sweep]}", *([NOTE[sweep]] if sweep in NOTE else []), compare(sweep, done, measures)]
        if done:
            _plot(sweep, done, out / f"{sweep}.png")
            parts.append(f"![]({sweep}.png)")
    text = "\n\n".join(parts) + "\n"
    (out / "tables.md").write_text(text, encoding="utf-8")
    return text


def compare(sweep: str, variants: Mapping[str, Mapping[int, Outcome]], measures: Sequence[str]) -> str:
    """The sweep's table: mean ± standard deviation over seeds; in brackets p of a paired t-test against token_drop."""
    from sctd_ds.eval.report import mean_of, paired_p, table

    control = variants.get("token_drop", {})
    columns, published = PAPER[sweep]
    rows, tests = [], 0
    for name, by_seed in variants.items():
        row: list[str | float | None] = [name, str(len(by_seed))]
        for measure in measures:
            values = {seed: reached.values[measure] for seed, reached in by_seed.items() if measure in reached.values}
            cell = mean_of([*values.values()], digits=4 if measure in FINE else 2)
            other = {seed: reached.values[measure] for seed, reached in control.items() if measure in reached.values}
            p = paired_p(other, values) if name != "token_drop" and measure not in (TIME, SAVED) else None
            tests += p is not None
            notes = [f"p {p:.3f}"] if p is not None else []
            notes += [f"of {len(values)}"] if 0 < len(values) < len(by_seed) else []
            row.append(f"{cell} ({', '.join(notes)})" if notes else cell)
        rows.append([*row, *(f"{value:.2f}" for value in published.get(name, ()))])
    text = table(["variant", "runs", *measures, *(f"*paper: {column}*" for column in columns)], rows)
    if tests > 1:
        text += (
            f"\n\n{tests} tests stand in this table; after Bonferroni's correction for them, p below {0.05 / tests:.2g} counts."
        )
    return text


def _origin(run: Run | None, out: Path, options: argparse.Namespace) -> str:
    """What was run, where, by which command."""
    if run is None:
        return "No run is finished."
    from sctd_ds.eval.twins import MARK

    report = json.loads((out / "runs" / run.name / "report.json").read_text(encoding="utf-8"))
    environment = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    size = f"{report['steps']} steps of {report['global_batch']} rows of {report['seq_length']} tokens"
    changed = f" with {', '.join(options.overrides)}" if options.overrides else ""
    synthetic = options.data_dir is not None and (options.data_dir / MARK).exists()
    twins = " Probes and tasks are synthetic twins, not the data sets they are named after." if synthetic else ""
    return (f"Base: {options.config.name}{changed}; {size}, {options.seeds} seeds, {environment}.\n\n"
            "Mean ± standard deviation over seeds; p: paired t-test over seeds against token_drop, not corrected for the "
            "number of comparisons. Losses in nats per masked token, probes and tasks in percent. ms_per_step is what the runs "
            f"took; where the machine was shared, flops_saved (percent of a dense step's operations) says more.{twins}"
    )  # fmt: skip


def _plot(sweep: str, variants: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    """A row for the loss, and one for the score where there is one: at the end, against training time, against operations."""
    from matplotlib.figure import Figure

    along = {
        name for by_seed in variants.values() for reached in by_seed.values() for point in reached.points for name in point
    }
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
    ends = {name: {seed: reached.values[measure] for seed, reached in by_seed.items() if measure in reached.values}
            for name, by_seed in variants.items()}  # fmt: skip
    ends = {name: values for name, values in ends.items() if values}
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


if __name__ == "__main__":
    sys.exit(main())
