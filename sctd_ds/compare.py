"""Finished runs side by side: what their operations and hours bought.

    python -m sctd_ds.compare runs/large runs/large_control [...] [--out DIR]

prints a table of validation losses with operations and hours, and writes it as compare.md beside a figure, compare.png. The
first run is the one that the others are compared with. `pretrain.py --write-control FILE` writes the fairest second run: dense
training with the same operations and a decay of its own. The loss along a run is that of a learning rate still high, so only
ends are compared in the table. The exit code is 2 for runs that cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sctd_ds.config import ConfigError
from sctd_ds.run import metrics
from sctd_ds.run.output import OutputError
from sctd_ds.run.validation import COMMON_RATE

EQUAL = 0.02
"""Operations that differ by no more than this share count as equal."""
UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))


@dataclass(frozen=True)
class Finished:
    """A finished run: its report and the points of its validations."""

    name: str
    report: dict[str, Any]
    curve: list[metrics.Point]

    @property
    def loss(self) -> float:
        """`common_loss` at the end."""
        return common_loss(self.report["validation"])


def common_loss(validation: metrics.Record) -> float:
    """Validation loss with all tokens, in nats per masked token: at 15 % masks, whatever share the run trained with."""
    return validation["loss_15" if "loss_15" in validation else "loss_full"]


def read(folder: Path) -> Finished:
    """The finished run in `folder`. Raises ConfigError where there is none, or an older one that lacks what is needed."""
    file = folder / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give the folder of a finished run") from None
    if not report.get("validation") or not report.get("validated_on"):
        raise ConfigError(f"{file} does not say what the run was validated on: it is of an earlier version, or not validated")
    if "loss_15" in report["validation"]:
        report["validated_on"]["mlm_probability"] = COMMON_RATE
    records = metrics.read(folder / "metrics.jsonl")
    steps = [record["step"] for record in metrics.of("train", records)]
    if steps != list(range(steps[0] if steps else 1, report["steps"] + 1)):
        raise ConfigError(f"{folder / 'metrics.jsonl'}: records of some steps are missing, so operations cannot be counted")
    curve = metrics.curve(records, report["flops_per_sequence"], report["global_batch"])
    return Finished(str(folder), report, curve)


def check(runs: Sequence[Finished]) -> None:
    """ConfigError unless all runs were validated on the same rows with the same masks."""
    first = runs[0]
    for run in runs[1:]:
        for key, value in first.report["validated_on"].items():
            other = run.report["validated_on"].get(key)
            if other != value:
                raise ConfigError(
                    f"{run.name} and {first.name} were validated on different text ({key}: {other} and {value}), so their "
                    "losses do not compare: train them on the same data with the same rows"
                )


def table(runs: Sequence[Finished]) -> str:
    """The comparison as a Markdown table, and what it allows to say."""
    first = runs[0]
    unit, size = unit_for(runs)
    lines = [
        f"| run | method | steps | {unit} | hours | validation loss | difference | operations | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        end = run.curve[-1]
        difference = "" if run is first else f"{run.loss - first.loss:+.4f}"
        operations = end.operations / first.curve[-1].operations
        time = end.seconds / first.curve[-1].seconds
        cells = [
            run.name,
            run.report["method"],
            f"{run.report['steps']:,}",
            f"{end.operations / size:.4g}",
            f"{end.seconds / 3600:.3g}",
            f"{run.loss:.4f}",
            difference,
            f"{operations:.3f}",
            f"{time:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Differences and ratios are to {first.name}. One run each: another seed moves a loss, too."]
    unequal = [run.name for run in runs if abs(run.curve[-1].operations / first.curve[-1].operations - 1) > EQUAL]
    if unequal:
        lines.append(f"Not of equal operations: {', '.join(unequal)}.")
    return "\n".join(lines) + "\n"


def unit_for(runs: Sequence[Finished]) -> tuple[str, float]:
    """The unit in which the operations of the runs are short numbers, and its size."""
    most = max(run.curve[-1].operations for run in runs)
    return next(((unit, size) for unit, size in UNITS if most >= size), UNITS[-1])


def plot(runs: Sequence[Finished], path: Path) -> None:
    """Validation loss against operations and against hours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    by_operations, by_hours = figure.subplots(1, 2, sharey=True)
    unit, size = unit_for(runs)
    for run in runs:
        losses = [common_loss(point.record) for point in run.curve]
        by_operations.plot([point.operations / size for point in run.curve], losses, marker="o", ms=3, label=run.name)
        by_hours.plot([point.seconds / 3600 for point in run.curve], losses, marker="o", ms=3, label=run.name)
    by_operations.set(xlabel=f"operations, {unit}", ylabel="validation loss, nats per masked token")
    by_hours.set(xlabel="hours of training steps")
    by_operations.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.compare", description=__doc__, formatter_class=as_written)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a finished run; the first is what the others compare with")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="for the files (default: runs)")
    given = parser.parse_args(arguments)
    try:
        if len(given.run) < 2:
            raise ConfigError("give at least two runs")
        runs = [read(folder) for folder in given.run]
        check(runs)
    except (ConfigError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(runs)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compare.md").write_text(text, encoding="utf-8")
    plot(runs, given.out / "compare.png")
    print(f"{text}\nwritten: {given.out / 'compare.md'}, {given.out / 'compare.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
