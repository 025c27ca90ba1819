"""Measured training steps as a table for a terminal, CSV, Markdown and a figure. A row is a variant of a case in a phase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.harness import write_csv
from benchmarks.steps import BY_NAME
from sctd_ds.run.environment import Environment, versions

PACKAGES = ("deepspeed", "transformers")
"""Packages whose versions a results file has beside the environment's."""
PHASES = {"bare": "forward and backward of one micro-batch", "engine": "whole optimizer step (ZeRO-2, AdamW)"}
LEGEND = """\
Times are medians of interleaved steps, p20 and p80 their spread. ratio: time over that of the matching dense step (with the
whole last layer where a step has it; untouched Hugging Face for random-LTD; the compiled drop step for the eager one). ideal:
the ratio of their operations. reached: measured saving over ideal saving. x HF: speed over untouched Hugging Face's."""
COLUMNS: dict[str, tuple[str, str]] = {
    "variant": ("variant", ""),
    "ms": ("ms", ".1f"),
    "ms_p20": ("p20", ".1f"),
    "ms_p80": ("p80", ".1f"),
    "sequences_per_s": ("seq/s", ".1f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "model_tflops": ("TFLOP/s", ".3g"),
    "mfu": ("MFU", ".1%"),
    "ratio": ("ratio", ".3f"),
    "ideal_ratio": ("ideal", ".3f"),
    "saving_reached": ("reached", ".1%"),
    "speed_against_huggingface": ("x HF", ".2f"),
    "peak_gib": ("GiB", ".1f"),
    "first_step_s": ("first s", ".1f"),
}
"""Column of the CSV -> heading and format in printed tables, where a row without times shows its status."""


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, headings first, without empty columns."""
    shown = {key: column for key, column in COLUMNS.items() if key == "ms" or any(row.get(key) is not None for row in rows)}
    lines = [[heading for heading, _ in shown.values()]]
    for row in rows:
        line = ["" if row.get(key) is None else format(row[key], spec) for key, (_, spec) in shown.items()]
        if row.get("ms") is None:
            line[1] = row["status"]
        lines.append(line)
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text for a terminal."""
    lines = cells(rows)
    widths = []
    for i, heading in enumerate(lines[0]):
        # A status may run over the empty cells to its right, so it does not widen its column.
        of_column = [line[i] for line in lines if i != 1 or any(line[2:])]
        widths.append(max(map(len, [heading, *of_column])))
    text = []
    for name, *figures in lines:
        aligned = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(text)


def markdown(rows: Sequence[Mapping[str, Any]], environment: Environment, note: str) -> str:
    """All tables, with what a reader must know to judge them."""
    packages = ", ".join(f"{package} {version}" for package, version in versions(*PACKAGES).items())
    about = (
        f"{environment.device}, torch {environment.torch}, triton {environment.triton}, CUDA {environment.cuda}, {packages}, "
        f"Python {environment.python}, commit {environment.commit}, {environment.date}"
    )
    parts = ["# Training steps", f"`python -m benchmarks.train_step`: {about}.", *filter(None, [note]), LEGEND]
    for phase, title in PHASES.items():
        of_phase = [row for row in rows if row["phase"] == phase]
        if of_phase:
            parts.append(f"## {title[0].upper()}{title[1:]}")
        for case, group in itertools.groupby(of_phase, itemgetter("model", "length", "batch", "accumulation", "dtype")):
            (model, length, batch, accumulation, dtype), of_case = case, list(group)
            times = f" x {accumulation}" if phase == "engine" else ""
            parts.append(f"**{model}, {length} tokens, {batch}{times} rows, {dtype}**")
            if not any(row.get("ms") for row in of_case):
                parts[-1] += f": {of_case[0]['status']}"
                continue
            heading, *lines = cells(of_case)
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in [heading, ["---"] * len(heading), *lines]))
    return "\n\n".join(parts) + "\n"


def record(path: Path, rows: Sequence[Mapping[str, Any]], environment: Environment) -> None:
    """Write rows that need not have the same columns; missing values stay empty."""
    columns = dict.fromkeys(key for row in rows for key in row)
    full = [{key: rounded(row.get(key)) for key in columns} | versions(*PACKAGES) for row in rows]
    write_csv(path, full, environment)


def rounded(value: Any) -> Any:
    """Six digits of a float; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def plot(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """One panel per table: each variant's step time with its p20 and p80, and the time that its operations suggest."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.get("steps")]
    panel_of = itemgetter("phase", "model", "length", "batch", "accumulation")
    panels = list(dict.fromkeys(map(panel_of, measured)))
    if not panels:
        return
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.5 * across, 3.2 * down), layout="constrained")
    for axis, panel in zip(figure.subplots(down, across, squeeze=False).flat, panels, strict=False):
        phase, model, length, batch, accumulation = panel
        chosen = [row for row in measured if panel_of(row) == panel]
        names, ms = [row["variant"] for row in chosen], [row["ms"] for row in chosen]
        # A mean, as that of "spread", may lie outside of the percentiles.
        below = [max(0, row["ms"] - row["ms_p20"]) for row in chosen]
        above = [max(0, row["ms_p80"] - row["ms"]) for row in chosen]
        colors = ["tab:blue" if BY_NAME[name].converted else "tab:gray" for name in names]
        bars = axis.barh(names, ms, xerr=[below, above], color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        time_of = dict(zip(names, ms, strict=True))
        compared = [row for row in chosen if row.get("ideal_ratio")]
        if compared:
            ideal = [time_of[row["against"]] * row["ideal_ratio"] for row in compared]
            axis.plot(ideal, [row["variant"] for row in compared], "|", color="tab:orange", ms=18, mew=2)
        axis.invert_yaxis()
        axis.set(
            title=f"{model}, S={length}, B={batch} x {accumulation}, {phase}", xlabel="ms per step", xlim=(0, 1.2 * max(ms))
        )
    figure.suptitle(f"{title}\norange: the dense step x ratio of operations; gray: untouched model", fontsize=9)
    figure.savefig(path, dpi=110)
