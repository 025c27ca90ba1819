"""The paper's ablations at any size: objectives (Table 4), lambda (Figure 7), Fi (Table 5), method (Table 2, Figure 6).

    python -m benchmarks.ablate --config ds_configs/tiny.json --out runs/ablation --sweep method --seeds 3

Each variant and seed is an ordinary `pretrain.py` run from one base configuration. Finished runs are
kept: the same command continues, more sweeps or seeds add to them, and a run that two sweeps share runs
once. Runs that started on other data, or with other settings that rule out a comparison, are refused.

Every run is measured by its validation loss (with all tokens, and with dropping), its step time, and,
with --data-dir, a score: the mean over --tasks, each after fine-tuning, or without tasks over the
probes. --points N keeps N checkpoints along each run of the method sweep and scores them all (Figure 6).

results.csv has a line per run, curves.csv one per validation and scored checkpoint, tables.md
the tables with the paper's results, and there is a figure per sweep. Missing runs are omitted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

import sctd_ds
from benchmarks.ablation_tables import BEGAN, LAYERS, REPORT, Run, Runs, in_order, write
from benchmarks.harness import ROOT
from sctd_ds import data
from sctd_ds.config import MAY_DIFFER_IN_TABLE, ConfigError, differences
from sctd_ds.data.files import META
from sctd_ds.data.sources import documents, identity
from sctd_ds.eval import EvalError
from sctd_ds.eval.store import Model, fingerprint
from sctd_ds.eval.synthetic import MARK
from sctd_ds.eval.tasks import PROBES, TASKS
from sctd_ds.run.environment import commit
from sctd_ds.run.models import model_config
from sctd_ds.run.settings import RunConfig, load

# By sweep, the settings that each variant changes in the base configuration; a function receives the base's number of
# layers. Variants with equal settings share their runs.
# Table 4: L_SCg is the KL of layer l, L_SCl that of layer l-1. A row without L_MLM has no loss on the full pass, as in
# the released code, whose objective also sends the KL's gradient to the full pass.
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
CONTENT = " (content)"  # suffix of a key for the content of a file or folder, in contrast to its name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="base configuration; its method must be sctd")
    add("--out", type=Path, required=True, metavar="DIR", help="runs, results.csv, tables.md and figures")
    add("--sweep", nargs="+", choices=SWEEPS, default=["method"])
    add("--variants", nargs="+", metavar="NAME", help="some variants of the sweeps only")
    add("--seeds", type=int, default=3, help="runs per variant (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting of every run")
    add("--data", nargs="+", metavar="SOURCE", help="text or built data, for every run")
    add("--data-dir", type=Path, metavar="DIR", help="evaluation data, to probe every run's model; see also --tasks")
    add("--tasks", type=lambda text: text.split(","), default=[], metavar="A,B", help="also fine-tune on these")
    points = "score every run of the method sweep up to N times, evenly spaced and at its end; keeps these models"
    add("--points", type=int, default=1, metavar="N", help=points)
    add("--eval-arguments", default="", metavar="TEXT", help='for sctd_ds.eval, e.g. "--epochs 3 --learning-rate 1e-3"')
    add("--gpus", type=int, default=1, help="ranks of each run (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs = plan(options)
        used = agreed(in_order(runs), options)
    except (ConfigError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scored_along: set[Run] = set()
    if options.points > 1:
        scored_along.update(*runs.get("method", {}).values())
    with tqdm(in_order(runs), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for run in bar:
            bar.set_description(run.name)
            pretrain(run, options, used)
            if options.data_dir:
                evaluate(run, options, points=run in scored_along)
    print(tabulate(runs, options))
    return 0


def plan(options: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """The runs by sweep and variant. Checks every configuration before the first run starts. Raises ConfigError."""
    for flag, value in (("--seeds", options.seeds), ("--gpus", options.gpus)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: expected at least 1")
    base = load(options.config, options.overrides, options.gpus)
    if options.points < 1 or options.points > base.pretrain.steps:
        raise ConfigError(f"--points {options.points}: expected 1 to {base.pretrain.steps}, the steps of a run")
    if options.points > 1 and (not options.data_dir or base.pretrain.stages > 1):
        raise ConfigError(f"--points {options.points}: needs --data-dir, for the scores, and runs without pipeline stages")
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f"--tasks {','.join(unknown)}: unknown; choose from {', '.join(TASKS)}")
    if options.tasks and not options.data_dir:
        raise ConfigError(f"--tasks {','.join(options.tasks)}: needs --data-dir, the folder with the tasks' data")
    if base.sctd.method != "sctd":
        raise ConfigError(f'{options.config}: sctd.method is "{base.sctd.method}"; the base of an ablation must be "sctd"')
    settings, layers = base.flat(), model_config(base.pretrain).num_hidden_layers
    runs: dict[str, dict[str, list[Run]]] = {}
    for sweep in options.sweep:
        for variant, changes in SWEEPS[sweep].items():
            if options.variants and variant not in options.variants:
                continue
            if LAYERS in changes and base.pretrain.trained_model:
                print(f"{variant}: left out, as the depth of {base.pretrain.trained_model} is fixed", file=sys.stderr)
                continue
            changes = {key: value(layers) if callable(value) else value for key, value in changes.items()}
            # A value that the base already has is no change, so "Fi=10", "lambda=0.05" and "sctd" share their runs.
            real = tuple(sorted((key, value) for key, value in changes.items() if settings.get(key) != value))
            seeds = [Run(real, seed) for seed in range(options.seeds)]
            configured(seeds[0], options)
            runs.setdefault(sweep, {})[variant] = seeds
    missing = set(options.variants or ()) - {variant for variants in runs.values() for variant in variants}
    if missing:
        raise ConfigError(f"--variants {', '.join(sorted(missing))}: not in the sweeps {', '.join(options.sweep)}")
    return runs


def configured(run: Run, options: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """The run's configuration, and the overrides that make it from the base file.

    --points determines the steps of validations and checkpoints.
    """
    overrides = [*options.overrides, *run.overrides()]
    if options.points > 1:
        steps = load(options.config, overrides, options.gpus).pretrain.steps
        every = math.ceil(steps / options.points)
        overrides += [f"pretrain.{name}={every}" for name in ("save_every", "validation_every")]
        overrides.append(f"pretrain.keep_last={steps}")  # keep all, including those of interruptions
    return load(options.config, overrides, options.gpus), overrides


def agreed(runs: list[Run], options: argparse.Namespace) -> dict[str, str]:
    """The `contents` that all runs share, earlier ones and new ones, after a check that the runs are comparable.

    Raises ConfigError for an earlier run whose settings differ too much for one table, DataError for unreadable data.
    """
    begun = {run: file for run in runs if (file := run.folder(options.out) / BEGAN).is_file()}
    before = {run: json.loads(file.read_text(encoding="utf-8"))["settings"] for run, file in begun.items()}
    if all((run.folder(options.out) / REPORT).is_file() for run in runs):
        # All are finished, so the data may be gone; compare the runs with each other.
        used = {key: value for key, value in before[runs[0]].items() if key.endswith(CONTENT)}
    else:
        used = contents(options)
    for run, old in before.items():
        changed = differences(old, settings_of(run, options, used), MAY_DIFFER_IN_TABLE)
        if changed:
            raise ConfigError(
                f"{begun[run].parent}: started with other settings ({'; '.join(changed)}), so it does not compare with the "
                "other runs: choose another --out, or delete it"
            )
    return used


def settings_of(run: Run, options: argparse.Namespace, used: Mapping[str, str]) -> dict[str, Any]:
    """All settings that the run starts with, under dotted keys. used: its `contents`."""
    flat = configured(run, options)[0].flat()
    flat["pretrain.data"] = sources(options, flat["pretrain.data"])
    return json.loads(json.dumps({**flat, **used}))


def contents(options: argparse.Namespace) -> dict[str, str]:
    """Fingerprints of the runs' data, tokenizer and initial model, by setting; of names only for what is not on this machine.

    Raises DataError for unreadable data.
    """
    config = load(options.config, options.overrides, options.gpus).pretrain
    found = {"pretrain.data": fingerprint([_fingerprint_of_data(name) for name in sources(options, config.data)])}
    for key, name in (("pretrain.tokenizer", config.tokenizer), ("pretrain.model", config.trained_model)):
        if name:
            found[key] = fingerprint(*sorted(file for file in Path(name).glob("[!.]*") if file.is_file()), name)
    return {key + CONTENT: value for key, value in found.items()}


def _fingerprint_of_data(name: str) -> str:
    path = Path(name)
    if (path / META).is_file():
        return data.load(path).meta.fingerprint
    if not path.exists():
        return fingerprint(identity(name))
    digest = hashlib.sha256()
    for text in documents(name, "text"):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def sources(options: argparse.Namespace, configured: str | list[str]) -> list[str]:
    """Names of the data that the runs read."""
    if options.data:
        return options.data
    return [configured] if isinstance(configured, str) else configured


def pretrain(run: Run, options: argparse.Namespace, used: Mapping[str, str]) -> None:
    """Start or continue the run's `pretrain.py`, unless it is finished. Its output goes to the run's log.txt.

    used: its `contents`, as they were before the first run.
    """
    folder = run.folder(options.out)
    if (folder / REPORT).is_file():
        return
    changed = [key for key, value in contents(options).items() if used[key] != value]
    if changed:
        raise SystemExit(f"{run.name}: {', '.join(changed)} changed since the first run; restore it, or choose another --out")
    overrides = configured(run, options)[1]
    folder.mkdir(parents=True, exist_ok=True)
    began = {"commit": commit(), "settings": settings_of(run, options, used)}
    (folder / BEGAN).write_text(json.dumps(began, indent=1), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(options.gpus), "--master_port", str(port)]
    command = [*launcher, str(ROOT / "pretrain.py"), "--deepspeed_config", str(options.config), "--output", str(folder)]
    command += [part for item in overrides for part in ("--set", item)]
    command += ["--data", *options.data] if options.data else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if status.returncode or not (folder / REPORT).is_file():
        raise SystemExit(f"{run.name}: pretrain.py ended with status {status.returncode}; see {folder / 'log.txt'}")


def evaluate(run: Run, options: argparse.Namespace, points: bool) -> None:
    """Probe and fine-tune the run's model, and, if `points`, the models along the run; sctd_ds.eval skips earlier outcomes."""
    from sctd_ds.eval.__main__ import main as evaluation

    folder = run.folder(options.out)
    models = [f"{run.name}={folder}"]
    config, _ = configured(run, options)
    # Probes also run the dropped pass, for which the model of "fewer layers" may be too shallow.
    tasks = [*(PROBES if model_config(config.pretrain).num_hidden_layers >= 4 else ()), *options.tasks]
    if not tasks:
        return
    if points:
        for step in range(config.pretrain.save_every, config.pretrain.steps, config.pretrain.save_every):
            models.append(f"{run.name}@{step}={export_point(folder, step)}")
    command = [*models, "--data-dir", str(options.data_dir), "--out", str(options.out / "eval"), "--seeds", "1"]
    command += ["--tasks", ",".join(tasks), *options.eval_arguments.split()]
    with (folder / "eval.md").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        status = evaluation(command)
    if status:
        raise SystemExit(f"{run.name}: evaluation ended with status {status}")


def export_point(folder: Path, step: int) -> Path:
    """Replace a finished run's checkpoint by a Hugging Face folder, RUN/points/step_..., and return this.

    Its weights have the dtype of the forward pass: in a 16-bit run they are rounded, unlike those of RUN/model.
    """
    name = f"step_{step:08d}"
    target, checkpoint = folder / "points" / name, folder / "checkpoints" / name
    if target.is_dir():
        return target
    try:
        weights, learned = Model(folder.name, str(folder / "model"), folder, checkpoint).read_checkpoint()
    except (EvalError, OSError) as error:
        raise SystemExit(f"--points needs the checkpoints of a run that began with it: {error}") from error
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder / "model", trust_remote_code=False)
    model.load_state_dict(weights)
    if learned:  # export writes the table of a converted model
        about = {"drop_ratio": learned.drop_ratio, "importance": learned.policy, "keep_token_ids": []}
        sctd_ds.convert(model, sctd_ds.ScTDConfig(**about))
        sctd_ds.importance(model).scores.copy_(learned.scores)  # only these: the counts behind them are not needed
    target.parent.mkdir(exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
    sctd_ds.export(model, target, tokenizer)
    shutil.rmtree(checkpoint)
    return target


def tabulate(runs: Runs, options: argparse.Namespace) -> str:
    """Write the tables and figures of the finished runs; returns the Markdown."""
    base = load(options.config, options.overrides, options.gpus)
    about = options.config.name + (f" with {', '.join(options.overrides)}" if options.overrides else "")
    synthetic = options.data_dir is not None and (options.data_dir / MARK).exists()
    return write(options.out, runs, base, about=about, tasks=options.tasks, synthetic=synthetic)


if __name__ == "__main__":
    sys.exit(main())
