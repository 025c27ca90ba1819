"""What one training step costs: every kind of step side by side, in one process, against dense and untouched Hugging Face.

    python -m benchmarks.train_step                                   # base and large, S 128 and 512 (a GPU)
    python -m benchmarks.train_step --cases large:512:64 --profile    # one case, and where its time goes

Two measurements: "bare" is forward and backward of one micro-batch; "engine" is a whole optimizer step of the real engine
(DeepSpeed, ZeRO-2, AdamW, gradient clipping, the importance table). Variants take turns (A B C A B C ...) in bursts of a
few steps, so that a drifting clock meets all of them. Inputs are random ids with exactly the labels per row that
pretraining has; results go to <out>/<device>/ as CSV, Markdown and PNG.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Environment, single_process, write_csv
from benchmarks.profiling import profile_steps
from benchmarks.steps import (
    ALIGN,
    BY_NAME,
    DTYPES,
    HUGGING_FACE,
    MODELS,
    SEPARATE,
    VARIANTS,
    Case,
    Setup,
    Trainer,
    Variant,
)
from sctd_ds.config import ScTDConfig
from sctd_ds.method.schedule import aligned_rows, mean_cost
from sctd_ds.run.probe import interleave, time_calls

INTERVALS = (5, 10, 20, 50)
BURST = 4
"""Steps of one turn. They follow each other without a wait, as in training; only the first starts with an idle device."""
PHASES = {"bare": "forward and backward of one micro-batch", "engine": "whole optimizer step (ZeRO-2, AdamW)"}
LEGEND = """\
Times are medians of interleaved steps, p20 and p80 their spread. ratio: time over that of the dense step of the same kind (with
the whole last layer where a step has it; untouched Hugging Face for random-LTD). ideal: the ratio of their operations. reached:
measured saving over ideal saving. x HF: speed over untouched Hugging Face's."""


@dataclass
class Measured:
    """Times of one variant's steps in ms, its peak device memory, and the seconds of its first step (compilation)."""

    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_s: float = 0.0
    status: str = "measured"


def measure(trainer: Trainer, case: Case, variants: Sequence[Variant], steps: int) -> dict[str, Measured]:
    """Time at least `steps` steps of each variant after a warm-up, interleaved.

    With an engine, running out of memory leaves DeepSpeed's buckets half filled: OutOfMemoryError asks for a new trainer.
    """
    batches = case.batches(trainer.setup.device, BURST)
    first_s = {variant.name: warm_up(trainer, case, variant, batches) for variant in variants}

    def turn(variant: Variant) -> list[Callable[[], None]]:
        trainer.choose(variant, case)
        return [partial(trainer.step, batch) for batch in batches]

    timed = interleave({variant.name: partial(turn, variant) for variant in variants}, rounds=-(-steps // BURST))
    return {name: Measured([ms for burst in each.ms for ms in burst], each.peak_bytes, first_s[name])
            for name, each in timed.items()}  # fmt: skip


def warm_up(trainer: Trainer, case: Case, variant: Variant, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """First steps of a variant: compilation, every shape that it has, the allocator's growth. Returns seconds of the first."""
    trainer.choose(variant, case)
    start = time.perf_counter()
    time_calls([partial(trainer.step, batches[0])])
    first_s = time.perf_counter() - start
    # Rows of a "spread" step differ by one from step to step unless the interval divides the batch.
    config = case.config(variant)
    counts = {len(aligned_rows(config, step, case.batch)) for step in range(config.interval)}
    more = itertools.islice(itertools.cycle(batches), 2 if len(counts) == 1 else config.interval)
    time_calls([partial(trainer.step, batch) for batch in more])
    return first_s


def measure_surviving(
    trainer: Trainer, renew: Callable[[], Trainer], case: Case, variants: Sequence[Variant], steps: int
) -> tuple[dict[str, Measured], Trainer]:
    """`measure`, where variants that cannot run or run out of memory get a status. Also returns the trainer to go on with."""
    reasons = {variant.name: trainer.missing(variant) for variant in variants}
    lost = {name: Measured(status=f"not measured: {reason}") for name, reason in reasons.items() if reason}
    while True:
        try:
            found = measure(trainer, case, [variant for variant in variants if variant.name not in lost], steps)
            return {variant.name: {**found, **lost}[variant.name] for variant in variants}, trainer
        except torch.OutOfMemoryError:
            failed = trainer.variant
        # Outside the except block: the traceback no longer holds the step's tensors.
        lost[failed.name] = Measured(status="out of memory")
        had_engine = trainer.engine is not None
        trainer.close()
        trainer = renew()
        if had_engine:
            trainer.start_engine()


def step_rows(case: Case, phase: str, setup: Setup, results: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """One row of figures per variant. Ratios are of median step times; "ideal" ratios are of operations (sctd_ds.schedule).

    saving_reached: measured saving / ideal saving against the variant's dense step, for variants that ideally save.
    """
    sequences = case.batch * (setup.accumulation if phase == "engine" else 1)
    # Steps of "spread" differ by design (some have one aligned row more), so that theirs is a mean.
    middle = {name: statistics.mean if name == "spread" else statistics.median for name in results}
    median = {name: middle[name](result.ms) for name, result in results.items() if result.ms}
    rows = []
    for name, result in results.items():
        variant = BY_NAME[name]
        row: dict[str, Any] = {**describe(case, phase, setup, name), "against": variant.against, "status": result.status}
        rows.append(row)
        if name not in median:
            continue
        ms = median[name]
        p20, p80 = quantiles(result.ms)
        rate = sequences / ms * 1e3
        flops = case.flops(variant)
        row |= {
            "ms": ms, "ms_p20": p20, "ms_p80": p80, "ms_min": min(result.ms), "steps": len(result.ms),
            "sequences_per_s": rate, "tokens_per_s": rate * case.length, "model_tflops": rate * flops / 1e12,
            "mfu": rate * flops / setup.peak_flops if setup.peak_flops else None,
            "peak_gib": result.peak_bytes / 2**30 if result.peak_bytes else None, "first_step_s": result.first_s,
            "speed_against_huggingface": median[HUGGING_FACE] / ms if HUGGING_FACE in median else None,
        }  # fmt: skip
        if variant.against in median:
            ratio, ideal = ms / median[variant.against], flops / case.flops(BY_NAME[variant.against])
            row |= {"ratio": ratio, "ideal_ratio": ideal, "ratio_over_ideal": ratio / ideal,
                    "saving_reached": (1 - ratio) / (1 - ideal) if ideal < 1 else None}  # fmt: skip
    return rows


def average_rows(case: Case, phase: str, setup: Setup, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows like those of `step_rows` for ScTD as a whole: drop and align steps as they were measured, mixed by the schedule."""
    measured = {row["variant"]: row for row in steps if "ratio" in row}
    rows = []
    for align, interval in itertools.product((ALIGN, SEPARATE), INTERVALS):
        if not {"dense", "drop", align} <= measured.keys():
            continue
        costs = {"dense": measured["dense"], "drop": measured["drop"], "align": measured[align]}

        def average(key: str, costs: Mapping[str, Any] = costs, interval: int = interval) -> float:
            return mean_cost(ScTDConfig(interval=interval), {mode: row[key] for mode, row in costs.items()})

        ms, ratio, ideal = average("ms"), average("ratio"), average("ideal_ratio")
        dense = measured["dense"]
        rate, huggingface = dense["sequences_per_s"] / ratio, dense["speed_against_huggingface"]
        rows.append({
            **describe(case, phase, setup, f"sctd Fi={interval}" + ("" if align == ALIGN else ", separate prefix")),
            "against": "dense", "status": "from drop and align", "ms": ms, "sequences_per_s": rate,
            "tokens_per_s": rate * case.length, "speed_against_huggingface": huggingface / ratio if huggingface else None,
            "ratio": ratio, "ideal_ratio": ideal, "ratio_over_ideal": ratio / ideal,
            "saving_reached": (1 - ratio) / (1 - ideal),
        })  # fmt: skip
    return rows


def describe(case: Case, phase: str, setup: Setup, variant: str) -> dict[str, Any]:
    """The columns that name a row."""
    return {"model": case.model, "length": case.length, "batch": case.batch, "accumulation": setup.accumulation,
            "dtype": setup.dtype, "compile": setup.compile, "phase": phase, "variant": variant}  # fmt: skip


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "variant": ("variant", str),
    "ms": ("ms", "{:.1f}".format),
    "ms_p20": ("p20", "{:.1f}".format),
    "ms_p80": ("p80", "{:.1f}".format),
    "sequences_per_s": ("seq/s", "{:.1f}".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "model_tflops": ("TFLOP/s", "{:.3g}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "ratio": ("ratio", "{:.3f}".format),
    "ideal_ratio": ("ideal", "{:.3f}".format),
    "saving_reached": ("reached", "{:.1%}".format),
    "speed_against_huggingface": ("x HF", "{:.2f}".format),
    "peak_gib": ("GiB", "{:.1f}".format),
    "first_step_s": ("first s", "{:.1f}".format),
}
"""Column of the CSV -> heading and format of the printed table; a row without times shows its status."""


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, its headings first, without columns that are empty throughout."""
    shown = {key: column for key, column in COLUMNS.items() if key == "ms" or any(row.get(key) is not None for row in rows)}
    lines = [[heading for heading, _ in shown.values()]]
    for row in rows:
        line = ["" if row.get(key) is None else text(row[key]) for key, (_, text) in shown.items()]
        if row.get("ms") is None:
            line[1] = row["status"]
        lines.append(line)
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text for a terminal."""
    lines = cells(rows)
    # A status may run over the empty cells to its right.
    widths = [max(len(line[i]) for line in lines if i != 1 or any(line[2:]) or line is lines[0]) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Mapping[str, Any]], environment: Environment, note: str) -> str:
    """All tables with what a reader must know to judge them."""
    versions = {"torch": environment.torch, "triton": environment.triton, "CUDA": environment.cuda,
                **{package: version(package) for package in ("deepspeed", "transformers")},
                "Python": environment.python, "commit": environment.commit}  # fmt: skip
    about = ", ".join([environment.device, *(f"{name} {value}" for name, value in versions.items()), environment.date])
    parts = ["# Training steps", f"`python -m benchmarks.train_step`: {about}.", *filter(None, [note]), LEGEND]
    for phase, title in PHASES.items():
        of_phase = [row for row in rows if row["phase"] == phase]
        parts += [f"## {title[0].upper()}{title[1:]}"] if of_phase else []
        for (model, length, batch, dtype), group in itertools.groupby(
            of_phase, itemgetter("model", "length", "batch", "dtype")
        ):
            of_case = list(group)
            parts.append(f"**{model}, {length} tokens, {batch} rows, {dtype}**")
            if not any(row.get("ms") for row in of_case):
                parts[-1] += f": {of_case[0]['status']}"
                continue
            heading, *lines = cells(of_case)
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in [heading, ["---"] * len(heading), *lines]))
    return "\n\n".join(parts) + "\n"


def record(path: Path, rows: Sequence[Mapping[str, Any]], environment: Environment) -> None:
    """Write rows that need not have the same columns; missing values stay empty."""
    versions = {package: version(package) for package in ("deepspeed", "transformers")}
    columns = dict.fromkeys(key for row in rows for key in row)
    full = [{key: rounded(row.get(key)) for key in columns} | versions for row in rows]
    write_csv(path, full, environment)


def rounded(value: Any) -> Any:
    """Six digits of a float; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def plot(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """One panel per case and phase: step time of each variant with its p20-p80, and where its operations alone would put it."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.get("steps")]
    panels = list(dict.fromkeys((row["phase"], row["model"], row["length"], row["batch"]) for row in measured))
    if not panels:
        return
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.5 * across, 3.2 * down), layout="constrained")
    for axis, panel in zip(figure.subplots(down, across, squeeze=False).flat, panels, strict=False):
        phase, model, length, batch = panel
        chosen = [row for row in measured if (row["phase"], row["model"], row["length"], row["batch"]) == panel]
        names, ms = [row["variant"] for row in chosen], [row["ms"] for row in chosen]
        # A mean, as that of "spread", may lie outside of the percentiles.
        spread = [[max(0, sign * (row["ms"] - row[end])) for row in chosen] for sign, end in ((1, "ms_p20"), (-1, "ms_p80"))]
        colors = ["tab:blue" if BY_NAME[name].ours else "tab:gray" for name in names]
        axis.bar_label(axis.barh(names, ms, xerr=spread, color=colors), fmt="%.1f", padding=3, fontsize=8)
        time_of = dict(zip(names, ms, strict=True))
        ideal = [(time_of[row["against"]] * row["ideal_ratio"], row["variant"]) for row in chosen if row.get("ideal_ratio")]
        if ideal:
            axis.plot(*zip(*ideal, strict=True), "|", color="tab:orange", ms=18, mew=2)
        axis.invert_yaxis()
        axis.set(title=f"{model}, S={length}, B={batch}, {phase}", xlabel="ms per step", xlim=(0, 1.2 * max(ms)))
    figure.suptitle(f"{title}\norange: the dense step x ratio of operations; gray: untouched model", fontsize=9)
    figure.savefig(path, dpi=110)


def run(
    cases: Sequence[Case], setup: Setup, *, phases: Sequence[str], variants: Sequence[Variant], steps: int, folder: Path,
    budget_s: float = float("inf"), profile: bool = False, note: str = "",
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure all cases, print a table for each, and write train_step.csv, .md and .png. Returns the rows.

    The CSV is written after each case, too. Cases whose turn comes after `budget_s` seconds, and big models without a GPU,
    become rows that say so. note: a sentence for the Markdown file, on the conditions of the measurement.
    """
    start, environment = time.perf_counter(), Environment.collect()
    rows: list[dict[str, Any]] = []
    for model in dict.fromkeys(case.model for case in cases):
        needs_gpu = setup.device.type == "cpu" and model != "small"
        build = partial(Trainer, model, setup)
        trainer = None if needs_gpu else build()
        for phase in phases:
            if trainer is not None and phase == "engine":
                trainer.start_engine()
            for case in (case for case in cases if case.model == model):
                late = time.perf_counter() - start > budget_s
                if trainer is None or late:
                    status = "not measured (time budget)" if late else "not measured (no GPU)"
                    rows += [{**describe(case, phase, setup, variant.name), "status": status} for variant in variants]
                    continue
                results, trainer = measure_surviving(trainer, build, case, variants, steps)
                new = step_rows(case, phase, setup, results)
                new += average_rows(case, phase, setup, new)
                rows += new
                print(f"\n{case}, {setup.dtype}, {PHASES[phase]} [{time.perf_counter() - start:.0f} s]", flush=True)
                print(table(new), flush=True)
                record(folder / "train_step.csv", rows, environment)
                if profile and phase == phases[-1]:
                    for variant in (v for v in variants if v.name in ("dense", "drop") and results[v.name].ms):
                        trainer.choose(variant, case)
                        print(f"\n{case}, {phase}, {variant.name}: {profile_trainer(trainer, case)}", flush=True)
        if trainer is not None:
            trainer.close()
    record(folder / "train_step.csv", rows, environment)
    (folder / "train_step.md").write_text(markdown(rows, environment, note), encoding="utf-8")
    title = f"{environment.device}, {setup.dtype}, torch {environment.torch}, commit {environment.commit}"
    plot(folder / "train_step.png", rows, title)
    return rows


def profile_trainer(trainer: Trainer, case: Case) -> str:
    """Where the time of the chosen variant's steps goes, as text."""
    batches = itertools.cycle(case.batches(trainer.setup.device, BURST))
    return profile_steps(lambda: trainer.step(next(batches)), head_rows=case.batch * case.labels,
                         vocabulary=case.shape.vocabulary).text()  # fmt: skip


def parse_cases(arguments: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """--cases, or the product of --models, --lengths and --batch. Without a GPU a small model joins what is asked for."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    try:
        if arguments.cases:
            parts = [item.split(":") for item in arguments.cases.split(",")]
            cases = [Case(model, int(length), int(batch)) for model, length, batch in parts]
        else:
            usual = {512: [32, 64], 128: [128, 256]}
            cases = [
                Case(model, length, batch)
                for model in arguments.models.split(",")
                for length in numbers(arguments.lengths)
                for batch in (numbers(arguments.batch) if arguments.batch else usual.get(length, [32]))
            ]
    except ValueError:
        raise SystemExit("expected --cases model:length:batch,... and comma-separated whole numbers elsewhere") from None
    for case in cases:
        if case.model not in MODELS:
            raise SystemExit(f'unknown model "{case.model}": expected one of {", ".join(MODELS)}')
        if not 8 <= case.length <= 512 or case.batch < 1:
            raise SystemExit(f"{case}: expected 8 to 512 tokens and at least one row")
    if not on_gpu and not any(case.model == "small" for case in cases):
        cases.insert(0, Case("small", 512, 1))
    return cases


def parse_variants(text: str) -> list[Variant]:
    """--variants; `dense`, the baseline, is always among them."""
    wanted = ["dense", *filter(None, (part.strip() for part in text.split(";")))]
    for name in wanted:
        if name not in BY_NAME:
            raise SystemExit(f'unknown variant "{name}": expected some of {"; ".join(BY_NAME)}, separated by ";"')
    return [variant for variant in VARIANTS if variant.name in wanted]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `train_step` and `table5` share."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--steps", type=int, default=24 if torch.cuda.is_available() else 8,
                        help="timed steps per variant, at least (default %(default)s)")  # fmt: skip
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default %(default)s")


def make_setup(arguments: argparse.Namespace) -> Setup:
    """The run's setup, with defaults that depend on the device."""
    from deepspeed.utils import logger as deepspeed_logger

    on_gpu = torch.cuda.is_available()
    deepspeed_logger.setLevel("WARNING")
    single_process()
    return Setup(torch.device("cuda" if on_gpu else "cpu"), arguments.dtype or ("fp16" if on_gpu else "fp32"),
                 on_gpu if arguments.compile is None else arguments.compile, arguments.accumulation)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--models", default="large,base", help="of large, base, small (default %(default)s)")
    parser.add_argument("--lengths", default="512,128", help="tokens per row (default %(default)s)")
    parser.add_argument("--batch", help="rows per micro-batch; default 32,64 at 512 tokens and 128,256 at 128")
    parser.add_argument("--cases", metavar="MODEL:LENGTH:BATCH,...", help="instead of the three above")
    parser.add_argument("--variants", default=";".join(v.name for v in VARIANTS), metavar="NAME;NAME",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--engine", action=argparse.BooleanOptionalAction,
                        help="only with the engine, or only without; default: both")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="where the device time of dense and drop steps goes")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="MINUTES",
                        help="begin no case after this time; its rows say so")  # fmt: skip
    parser.add_argument("--note", default="", help="a sentence on the conditions, for the Markdown file")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    setup = make_setup(arguments)
    cases = parse_cases(arguments, setup.device.type == "cuda")
    if setup.device.type == "cpu":
        print("No GPU: a small model stands in for the others. Its ratios mean something, its speed does not.")
    phases = {None: ("bare", "engine"), True: ("engine",), False: ("bare",)}[arguments.engine]
    folder = arguments.out / Environment.collect().folder_name
    rows = run(cases, setup, phases=phases, variants=parse_variants(arguments.variants), steps=arguments.steps, folder=folder,
               budget_s=60 * arguments.budget, profile=arguments.profile, note=arguments.note)  # fmt: skip
    for line in dict.fromkeys(f"{r['model']} S={r['length']} B={r['batch']}: {r['status']}" for r in rows if not r.get("ms")):
        print(line)
    print("\nwritten: " + ", ".join(str(folder / f"train_step.{kind}") for kind in ("csv", "md", "png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
