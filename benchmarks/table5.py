"""The paper's Table 5 on this device: what token dropping and ScTD save, measured, ideal, and as published.

    python -m benchmarks.table5

Reads the step times that `python -m benchmarks.train_step` recorded for this device, or measures them now.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.step_tables import record
from benchmarks.steps import ALIGN, BY_NAME, SEPARATE, Case
from benchmarks.train_step import add_arguments, make_setup, run
from sctd_ds.method.flops import flops_saved
from sctd_ds.run.environment import Environment

# Hours of 35K pretraining steps of BERT-large at 512 tokens (Zhong et al., ACL 2023, Table 5).
PAPER_BASELINE_HOURS = 4.93
PAPER_HOURS = {"drop": 3.87, "sctd Fi=5": 4.69, "sctd Fi=10": 4.25, "sctd Fi=20": 4.04, "sctd Fi=50": 3.92}
SEPARATELY = ", separate prefix"
SHAPE = itemgetter("batch", "accumulation")


def recorded(path: Path, model: str, length: int) -> list[dict[str, str]]:
    """Recorded steps with the engine, of one model and length; else []."""
    if not path.exists():
        return []
    wanted = ("engine", model, str(length))
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row["phase"], row["model"], row["length"]) == wanted]


def at_best_speed(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps at the micro-batch and accumulation whose dense step is the fastest per sequence; [] if no dense step ran."""
    dense = [row for row in rows if row["variant"] == "dense" and row.get("sequences_per_s")]
    if not dense:
        return []
    best = max(dense, key=lambda row: float(row["sequences_per_s"]))
    return [row for row in rows if SHAPE(row) == SHAPE(best)]


def compare(rows: Sequence[Mapping[str, Any]], case: Case) -> list[dict[str, Any]]:
    """The saved share of a dense step's time, by line of the paper's table: published, and ideal and measured here."""
    ratio = {row["variant"]: float(row["ratio"]) for row in rows if row.get("ratio")}
    table = []
    for name, hours in PAPER_HOURS.items():
        line: dict[str, Any] = {"method": name, "paper": 1 - hours / PAPER_BASELINE_HOURS}
        for prefix, suffix in (("shared", ""), ("separate", SEPARATELY)):
            variant = name if name == "drop" else name + suffix
            settings = {"method": "token_drop"} if name == "drop" else {"interval": int(name.split("=")[1])}
            config = case.config(BY_NAME["dense"]).model_copy(update={**settings, "shared_prefix": prefix == "shared"})
            line[f"{prefix}_ideal"] = flops_saved(case.shape, config)
            line[f"{prefix}_measured"] = 1 - ratio[variant] if variant in ratio else None
        table.append(line)
    return table


def text(table: Sequence[Mapping[str, Any]]) -> str:
    """The comparison for a terminal."""
    columns = ("paper", "separate_ideal", "separate_measured", "shared_ideal", "shared_measured")
    heading = ("paper", "two passes: ideal", "measured", "shared prefix: ideal", "measured")
    lines = [f"{'time saved':<14}" + "".join(f"{title:>22}" for title in heading)]
    for line in table:
        cells = ["not measured" if line[column] is None else f"{line[column]:.1%}" for column in columns]
        lines.append(f"{line['method']:<14}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.table5", description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", default="large", help="large (the paper's), base, or small (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows, if it measures now (default %(default)s)")
    parser.add_argument("--measure", action="store_true", help="measure now, even if there are recorded times")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    environment = Environment.collect()
    folder = arguments.out / environment.folder_name
    case = Case(arguments.model, arguments.length, arguments.batch)
    rows = at_best_speed(recorded(folder / "train_step.csv", case.model, case.length))
    if rows and not arguments.measure:
        environment = Environment(**{field.name: rows[0][field.name] for field in fields(Environment)})
    else:
        setup = make_setup(arguments)
        variants = [BY_NAME[name] for name in ("dense", "drop", ALIGN, SEPARATE)]
        stages = [("engine", accumulation) for accumulation in arguments.accumulation]
        found = run([case], setup, stages=stages, variants=variants, steps=arguments.steps, folder=folder / "table5")
        rows = at_best_speed(found) or found
    table = compare(rows, case)
    print(f"\nBERT-{case.model}, {case.length} tokens, {environment.device}: share of the dense step's time that is saved")
    print(text(table))
    batch = {key: rows[0].get(key) for key in ("model", "length", "batch", "accumulation", "dtype", "compile", "deterministic")}
    record(folder / "table5.csv", [{**batch, **line} for line in table], environment)
    print(f"written: {folder / 'table5.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
