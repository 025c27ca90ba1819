"""The paper's ablations at any size: objectives (Table 4), lambda (Figure 7), Fi (Table 5), method (Table 2, Figure 6).

    python -m benchmarks.ablate --config ds_configs/tiny.json --out runs/ablation --sweep method --seeds 3

Each variant and seed is an ordinary `pretrain.py` run from one base configuration. What is finished is kept: the same command
continues, more sweeps or seeds add to it, and runs that two sweeps share are run once. Every run is judged by its validation
loss, with all tokens and with dropping, by its step time, and, with --data-dir, by the probes and by fine-tuning (--tasks).
results.csv has a line per run, tables.md the paper's tables with ours beside, and a figure each. What was not run is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import ROOT, commit
from sctd_ds import metrics
from sctd_ds.config import ConfigError, differences, load

# GLUE averages of the paper: Table 4 and 5 after 35K steps of BERT-large; Table 2 after 250K of BERT-base.
PAPER = {
    "method": {"dense": 81.11, "token_drop": 80.35, "sctd": 81.72},
    "objective": {"dense": 77.73, "token_drop": 76.58, "L_MLM": 78.30, "L_SCl": 78.06, "L_SCg": 79.27, "L_MLM+L_SCl": 78.51,
                  "L_MLM+L_SCg": 79.26, "L_SCl+L_SCg": 79.36, "sctd": 79.58},
    "interval": {"dense": 77.73, "token_drop": 76.58, "Fi=5": 78.96, "Fi=10": 79.58, "Fi=20": 78.45, "Fi=50": 79.01},
    "lambda": {},  # Figure 7 has no numbers
}  # fmt: skip
PAPER_TITLE = {
    "method": "Table 2 and Figure 6: method (BERT-base, 250K steps)",
    "objective": "Table 4: training objectives (BERT-large, 35K steps)",
    "interval": "Table 5: interval Fi (BERT-large, 35K steps)",
    "lambda": "Figure 7: lambda (BERT-large, 35K steps)",
}

# By sweep, what each variant sets beside the base configuration. Variants of equal settings are one run.
# Table 4: L_SCg is the KL of layer l, L_SCl that of layer l-1. A row without L_MLM has no loss on the full pass, which is the
# released code's objective; there the full pass, which learns nothing else, also gets the KL's gradient.
_BASELINES = {"dense": {"sctd.method": "dense"}, "token_drop": {"sctd.method": "token_drop"}}
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "method": {
        **_BASELINES,
        "sctd": {},
        "sctd spread": {"sctd.align_schedule": "spread"},
        "random drop": {"sctd.method": "token_drop", "sctd.importance": "random"},
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
LOSS, TIME = "loss_full", "ms_per_step"
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

    def arguments(self) -> list[str]:
        pairs = [*self.changes, ("pretrain.seed", self.seed)]
        return [
            part
            for key, value in pairs
            for part in ("--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}")
        ]


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
    with tqdm(in_order(runs, options.seeds), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for run in bar:
            bar.set_description(run.name)
            pretrain(run, options)
            if options.data_dir:
                evaluate(run, options)
    print(write(options.out, runs, options))
    return 0


def plan(options: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """The runs by sweep and variant, each configuration checked before the first run starts. Raises ConfigError."""
    base = load(options.config, options.overrides, options.gpus)
    if base.sctd.method != "sctd":
        raise ConfigError(f'{options.config}: sctd.method is "{base.sctd.method}"; the base of an ablation must be "sctd"')
    settings = base.flat()
    runs: dict[str, dict[str, list[Run]]] = {}
    for sweep in options.sweep:
        known = SWEEPS[sweep]
        for variant, changes in known.items():
            if options.variants and variant not in options.variants:
                continue
            # What the base sets already is no change: so "Fi=10", "lambda=0.05" and "sctd" are one run.
            real = tuple(sorted((key, value) for key, value in changes.items() if settings.get(key) != value))
            of = [Run(real, seed) for seed in range(options.seeds)]
            load(options.config, [*options.overrides, *of[0].arguments()[1::2]], options.gpus)
            runs.setdefault(sweep, {})[variant] = of
    unknown = set(options.variants or ()) - {variant for variants in runs.values() for variant in variants}
    if unknown:
        raise ConfigError(f"--variants {', '.join(sorted(unknown))}: not in the sweeps {', '.join(options.sweep)}")
    return runs


def in_order(runs: Mapping[str, Mapping[str, Sequence[Run]]], seeds: int) -> list[Run]:
    """Every run once: sweep by sweep, and in each all variants of a seed before the next seed, so that a stop leaves pairs."""
    return list(dict.fromkeys(of[seed] for variants in runs.values() for seed in range(seeds) for of in variants.values()))


def pretrain(run: Run, options: argparse.Namespace) -> None:
    """Run `pretrain.py`, or continue it, or do nothing when it is finished. Its output goes to log.txt of the run."""
    folder = options.out / "runs" / run.name
    settings = load(options.config, [*options.overrides, *run.arguments()[1::2]], options.gpus).flat()
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
    command += [part for item in options.overrides for part in ("--set", item)] + run.arguments()
    command += ["--data", *options.data] if options.data else []
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
        )
    if status.returncode or not (folder / "report.json").is_file():
        raise SystemExit(f"{run.name}: pretrain.py ended with status {status.returncode}; see {folder / 'log.txt'}")


def evaluate(run: Run, options: argparse.Namespace) -> None:
    """Probe and fine-tune the run's model; what was done before is kept by sctd_ds.eval itself."""
    from sctd_ds.eval.__main__ import main as evaluation

    folder = options.out / "runs" / run.name
    command = [f"{run.name}={folder}", "--data-dir", str(options.data_dir), "--out", str(options.out / "eval"), "--seeds", "1",
               "--tasks", ",".join(["tense", "number", *options.tasks]), *options.eval_arguments.split()]  # fmt: skip
    with (folder / "eval.md").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        status = evaluation(command)
    if status:
        raise SystemExit(f"{run.name}: evaluation ended with status {status}")


def outcome(run: Run, out: Path) -> dict[str, float] | None:
    """What a finished run reached, by measure; None for one that is not finished."""
    folder = out / "runs" / run.name
    if not (folder / "report.json").is_file():
        return None
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    values: dict[str, float] = {
        key: report["validation"][key] for key in (LOSS, "loss_drop", "cosine_previous") if key in report["validation"]
    }
    values[TIME] = report["global_batch"] / report["samples_per_s"] * 1000
    values["flops_saved"] = 100 * report["flops_saved"]
    for path in sorted((out / "eval" / "scores" / run.name).glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        task, found = record["task"], record["scores"]
        if task.startswith("probe-"):
            # The layer below the last is where dropping shows most (Section 2.2 of the paper).
            values[f"{task} l-1, full"] = found["full_mean"][-2]
            values[f"{task} l-1, dropped"] = found["dropped_mean"][-2]
            values[f"{task} bag of words"] = found["bag_of_words"]
        else:
            from sctd_ds.eval.tasks import TASKS

            values[task] = statistics.fmean(found[metric] for metric in TASKS[task].metrics)
    return values


def write(out: Path, runs: Mapping[str, Mapping[str, Sequence[Run]]], options: argparse.Namespace) -> str:
    """Write results.csv, tables.md and the figures of the runs that are finished; returns the Markdown."""
    found = {run: outcome(run, out) for variants in runs.values() for of in variants.values() for run in of}
    finished = {run: values for run, values in found.items() if values is not None}
    measures = list(dict.fromkeys(name for values in finished.values() for name in values))
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sweep", "variant", "seed", "commit", *measures])
        for sweep, variants in runs.items():
            for variant, of in variants.items():
                for run in of:
                    if run in finished:
                        began = json.loads((out / "runs" / run.name / BEGAN).read_text(encoding="utf-8"))
                        values = (finished[run].get(measure, "") for measure in measures)
                        writer.writerow([sweep, variant, run.seed, began["commit"], *values])
    parts = ["# Ablations", _origin(next(iter(finished), None), out, options)]
    for sweep, variants in runs.items():
        done = {name: [run for run in of if run in finished] for name, of in variants.items()}
        of_sweep = {name: {run.seed: finished[run] for run in of} for name, of in done.items() if of}
        parts += [f"## {PAPER_TITLE[sweep]}", compare(sweep, of_sweep, measures)]
        folders = {name: [out / "runs" / run.name for run in of] for name, of in done.items()}
        _plot(sweep, of_sweep, folders, out / f"{sweep}.png")
        parts.append(f"![]({sweep}.png)")
    text = "\n\n".join(parts) + "\n"
    (out / "tables.md").write_text(text, encoding="utf-8")
    return text


def compare(sweep: str, variants: Mapping[str, Mapping[int, Mapping[str, float]]], measures: Sequence[str]) -> str:
    """The sweep's table: mean ± standard deviation over seeds; in brackets p of a paired t-test against token_drop."""
    from sctd_ds.eval.report import mean_of, paired_p, table

    control = variants.get("token_drop", {})
    rows = []
    for name, by_seed in variants.items():
        row: list[str | float | None] = [name, str(len(by_seed))]
        for measure in measures:
            values = {seed: found[measure] for seed, found in by_seed.items() if measure in found}
            cell = mean_of([*values.values()], digits=4 if measure in FINE else 2)
            other = {seed: found[measure] for seed, found in control.items() if measure in found}
            p = paired_p(other, values) if name != "token_drop" and measure not in (TIME, "flops_saved") else None
            row.append(cell if cell is None or p is None else f"{cell} (p {p:.3f})")
        published = PAPER[sweep].get(name)
        rows.append([*row, None if published is None else f"{published:.2f}"])
    return table(["variant", "runs", *measures, "*paper: GLUE average*"], rows)


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


def _plot(
    sweep: str, variants: Mapping[str, Mapping[int, Mapping[str, float]]], folders: Mapping[str, Sequence[Path]], path: Path
) -> None:
    """Left: loss by variant, one point per seed. Right: validation loss against training time (Figure 6)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, by_seed) in enumerate(variants.items()):
        left.plot([i] * len(by_seed), [found[LOSS] for found in by_seed.values()], "o", color=f"C{i}")
        for j, folder in enumerate(folders[name]):
            records, seconds, points = metrics.read(folder / "metrics.jsonl"), 0.0, []
            for record in records:
                seconds += record.get("step_ms", 0.0) / 1000
                if record["event"] == "validation":
                    points.append((seconds, record["loss_full"]))
            right.plot(*zip(*points, strict=True), color=f"C{i}", lw=1, marker=".", label=None if j else name)
    left.set_xticks(range(len(variants)), list(variants), rotation=20)
    left.set(ylabel="validation loss, all tokens", title=f"{sweep}: final loss, one point per seed")
    right.set(xlabel="training time (s)", ylabel="validation loss, all tokens", title="loss against time")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
