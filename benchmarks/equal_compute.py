"""Is dropping worth it? Every way of training gets the same operations, and dense training of equal compute is the control.

    python -m benchmarks.equal_compute --out runs/equal-compute
    python -m benchmarks.equal_compute --out runs/equal-compute --regime trunk --arms "dense-*" sctd-0 random-0 --seeds 0 1

A small BERT learns a generated language, or a text of yours, in this process and on one CPU thread, without DeepSpeed. Each arm
trains for as many steps as the budget buys, with its own linear decay to zero. Two regimes: "scratch", and "trunk", where all
arms of a seed continue from one dense model that was trained at a constant rate, on the same text or on another
(--trunk-text). Dense training runs at 0.75 to 1.35 of the budget, so that each arm's loss can be read as operations that dense
training needs for it: the compute multiplier.

An arm's name is its method and its dense_start, a share of its steps: random-0.2 drops random tokens after a dense first
fifth; random-0.2-finish is dense in its last fifth as well. Two arms are dense training whose steps cost about a quarter less:
fewer-layers, from scratch only, and fewer-rows. --list prints all names.

--out keeps a JSON file per finished run. The same command continues, other --arms and --seeds add to it, and several processes
may work in one folder, each on seeds of its own. results.csv, curves.csv, tables.md and equal_compute.png show what is
finished.
Exit status: 0 finished, 2 bad input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.equal_compute_arms import ARMS, DEFAULT, REGIMES, Arm, Regime, Study, choose
from benchmarks.equal_compute_tables import write
from benchmarks.equal_compute_training import Text, make_trunk, read_text, run, write_json
from sctd_ds.config import ConfigError
from sctd_ds.data import DataError
from sctd_ds.run.output import OutputError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.equal_compute", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, metavar="DIR", help="data, trunks, runs, tables and figure")
    add("--regime", nargs="+", choices=REGIMES, default=["scratch"], help="where arms start (default: scratch)")
    add("--arms", nargs="+", default=list(DEFAULT), metavar="PATTERN", help=f"default: {' '.join(DEFAULT)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of weights, data order, masks and dropout; "
        "default: 0 1 2")  # fmt: skip
    add("--list", action="store_true", help="print the names of all arms and end")
    add("--tables-only", action="store_true", help="write the tables of what is finished and end")
    group = made.add_argument_group("model, data and budget, the same for all runs of a folder")
    for name, field in Study.model_fields.items():
        kind, about = type(field.default), f"{field.description} (default: %(default)s)"
        metavar = {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(flag(name), type=kind, default=field.default, metavar=metavar, help=about)
    return made


def flag(name: str) -> str:
    """The option that sets a value of Study."""
    return f"--{name.replace('_', '-')}"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.list:
        print("\n".join(ARMS))
        return 0
    torch.set_num_threads(1)
    try:
        carry_out(options)
    except (ConfigError, DataError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def carry_out(options: argparse.Namespace) -> None:
    """Make the runs that are missing, one seed after the other, and then the tables."""
    if options.out is None:
        raise ConfigError("--out DIR is missing")
    study = Study(**{name: getattr(options, name) for name in Study.model_fields})
    check(study, options.seeds)
    if not options.tables_only:
        arms = choose(options.arms, options.regime)
        missing = [
            (regime, name, arm, seed)
            for seed, regime, (name, arm) in itertools.product(options.seeds, options.regime, arms.items())
            if not (regime == "trunk" and arm.fewer_layers) and not is_finished(study, options.out, regime, name, arm, seed)
        ]
        texts = {regime: read_text(study, options.out / "data", regime) for regime in {run[0] for run in missing}}
        with tqdm(missing, unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            for regime, name, arm, seed in bar:
                bar.set_description(f"{regime} {name} seed {seed}")
                finish(study, texts[regime], options.out, regime, name, arm, seed)
    print(write(options.out))


def check(study: Study, seeds: list[int]) -> None:
    """Raise ConfigError for values that no run can have."""
    for name, value in study:
        if not isinstance(value, str) and (value < 0 or (value == 0 and name not in ("warmup", "dropout"))):
            raise ConfigError(f"{flag(name)} {value}: expected more than 0")
    if study.layers < 4:
        raise ConfigError(f"--layers {study.layers}: dropping tokens needs at least 4")
    if study.hidden % study.heads:
        raise ConfigError(f"--hidden {study.hidden}: not a multiple of --heads {study.heads}")
    if study.dropout >= 1:
        raise ConfigError(f"--dropout {study.dropout}: expected a share below 1")
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {min(seeds)}: expected at least 0")


def file_of(out: Path, regime: Regime, name: str, seed: int) -> Path:
    """Where a finished run stands."""
    return out / "runs" / regime / name / f"seed-{seed}.json"


def is_finished(study: Study, out: Path, regime: Regime, name: str, arm: Arm, seed: int) -> bool:
    """Whether the run is there. Raises ConfigError where it was made with other settings."""
    path = file_of(out, regime, name, seed)
    if not path.is_file():
        return False
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    compare(path, settings, {**study.settings(regime), "method": dict(arm.method)})
    return True


def compare(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ConfigError where a file was made with settings that cannot stand in one table with those of today."""
    changed = [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]
    if changed:
        raise ConfigError(f"{path}: made with other settings ({'; '.join(changed)}); choose another --out, or delete it")


def finish(study: Study, text: Text, out: Path, regime: Regime, name: str, arm: Arm, seed: int) -> None:
    """Make one run and write its file; the trunk before it, where it needs one that is not there."""
    trunk = None
    if regime == "trunk":
        trunk = out / "trunks" / f"seed-{seed}.pt"
        if not trunk.is_file():
            make_trunk(study, text, seed, trunk)
        settings = torch.load(trunk, weights_only=True)["settings"]
        wanted = {key: value for key, value in study.settings("trunk").items() if key != "trunk_budget"}
        compare(trunk, settings, {**wanted, "data": text.trunk.meta.fingerprint})
    record = run(study, text, regime, arm, seed, trunk)
    write_json(file_of(out, regime, name, seed), {"regime": regime, "arm": name, "seed": seed, **record})


if __name__ == "__main__":
    raise SystemExit(main())
