"""What one training step costs: all variants side by side, in one process, against dense and untouched Hugging Face.

    python -m benchmarks.train_step                                   # base and large, S 128 and 512 (a GPU)
    python -m benchmarks.train_step --cases large:512:64 --profile    # one case, and where its time goes

Two measurements: "bare" is forward and backward of one micro-batch; "engine" is a whole optimizer step of the real engine
(DeepSpeed, ZeRO-2, AdamW, gradient clipping, the importance table). Variants take turns (A B C A B C ...) in bursts of a
few steps, so that a drifting clock affects all of them alike. Inputs are random ids with as many labels per row as in
pretraining; results go to <out>/<device>/ as CSV, Markdown and PNG. A variant that fails is a row with the reason, the others
are measured without it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import MEASURED, RESULTS, failure, has_failed, single_process
from benchmarks.profiling import Breakdown, profile_steps
from benchmarks.step_tables import PHASES, markdown, plot, record, table
from benchmarks.steps import (
    ALIGN,
    BY_NAME,
    DTYPES,
    HUGGING_FACE,
    MODELS,
    ON_A_CPU,
    SEPARATE,
    VARIANTS,
    Case,
    Setup,
    Trainer,
    Variant,
)
from sctd_ds.config import ScTDConfig
from sctd_ds.method.schedule import aligned_rows, mean_cost
from sctd_ds.run import job
from sctd_ds.run.environment import Environment
from sctd_ds.run.probe import interleave, time_calls

INTERVALS = (5, 10, 20, 50)
BURST = 4
"""Steps of one turn. They follow each other without a wait, as in training; only the first finds the device idle."""


@dataclass
class Measured:
    """Times of one variant's steps in ms, its peak device memory, and the seconds of its first step (compilation)."""

    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_s: float = 0.0
    status: str = MEASURED
    profile: Breakdown | None = None


def measure(
    make: Callable[[], Trainer], case: Case, variants: Sequence[Variant], steps: int, profiled: Sequence[str] = ()
) -> dict[str, Measured]:
    """Time at least `steps` steps of each variant. One that cannot run or fails gets a status; a new trainer takes the others.

    make: builds a trainer. A failure can leave one useless: memory that is lost, DeepSpeed's buckets half filled. Where none
    can be built any more, what was measured until then stays. profiled: names of variants to profile afterwards.
    """
    found = {variant.name: Measured() for variant in variants}
    waiting = list(variants)
    while waiting:
        trainer = None
        try:
            with closing(make()) as trainer:
                for variant in variants:
                    if reason := trainer.missing(variant):
                        found[variant.name].status = f"not measured: {reason}"
                waiting = [variant for variant in waiting if found[variant.name].status == MEASURED]
                take_turns(trainer, case, waiting, steps, found)
                for variant in waiting:
                    if variant.name in profiled and not found[variant.name].profile:
                        found[variant.name].profile = profile_variant(trainer, variant, case)
                return found
        except Exception as error:  # whatever it is, the other figures are worth having
            status = failure(error)
        # Outside of the except block: the traceback no longer holds the step's tensors.
        blamed = [trainer.variant] if trainer is not None and trainer.variant in waiting else waiting
        for variant in blamed:
            found[variant.name].status = status
        waiting = [variant for variant in waiting if variant not in blamed]
    return found


def take_turns(trainer: Trainer, case: Case, variants: Sequence[Variant], steps: int, found: Mapping[str, Measured]) -> None:
    """Step the variants in turns after a warm-up, until each has `steps` times in `found`."""
    batches = case.batches(trainer.setup.device, BURST)
    for variant in variants:
        found[variant.name].first_s = warm_up(trainer, case, variant, batches)

    def turn(variant: Variant) -> list[Callable[[], None]]:
        trainer.choose(variant, case)
        return [partial(trainer.step, batch) for batch in batches]

    turns = {variant.name: partial(turn, variant) for variant in variants}
    while any(len(found[name].ms) < steps for name in turns):
        for name, timed in interleave(turns, rounds=1).items():
            found[name].ms += timed.ms[0]
            if timed.peak_bytes is not None:
                found[name].peak_bytes = max(timed.peak_bytes, found[name].peak_bytes or 0)


def warm_up(trainer: Trainer, case: Case, variant: Variant, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """First steps of a variant: compilation, all its shapes, the allocator's growth. Returns seconds of the first."""
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


def step_rows(case: Case, phase: str, setup: Setup, results: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """One row of figures per variant. Ratios are of median step times; "ideal" ratios are of operations.

    saving_reached: measured saving / ideal saving against the variant's dense step, for variants that ideally save.
    """
    sequences = case.batch * (setup.accumulation if phase == "engine" else 1)
    median = {name: middle(name, result.ms) for name, result in results.items() if result.ms}
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
            "ms": ms,
            "ms_p20": p20,
            "ms_p80": p80,
            "ms_min": min(result.ms),
            "steps": len(result.ms),
            "sequences_per_s": rate,
            "tokens_per_s": rate * case.length,
            "model_tflops": rate * flops / 1e12,
            "mfu": rate * flops / setup.peak_flops if setup.peak_flops else None,
            "peak_gib": result.peak_bytes / 2**30 if result.peak_bytes else None,
            "first_step_s": result.first_s,
            "speed_against_huggingface": median[HUGGING_FACE] / ms if HUGGING_FACE in median else None,
        }
        if variant.against in median:
            row |= ratios(ms / median[variant.against], flops / case.flops(BY_NAME[variant.against]))
    return rows


def middle(name: str, ms: Sequence[float]) -> float:
    """A variant's usual step time. "spread" gets the mean: by design, some of its steps align one row more than others."""
    return statistics.mean(ms) if name == "spread" else statistics.median(ms)


def ratios(ratio: float, ideal: float) -> dict[str, float | None]:
    """The columns that compare a step's time (ratio) and operations (ideal) with those of its dense step."""
    return {
        "ratio": ratio,
        "ideal_ratio": ideal,
        "ratio_over_ideal": ratio / ideal,
        "saving_reached": (1 - ratio) / (1 - ideal) if ideal < 1 else None,
    }


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
        row = {
            **describe(case, phase, setup, f"sctd Fi={interval}" + ("" if align == ALIGN else ", separate prefix")),
            "against": "dense",
            "status": "from drop and align",
            "ms": ms,
            "sequences_per_s": rate,
            "tokens_per_s": rate * case.length,
            "speed_against_huggingface": huggingface / ratio if huggingface else None,
            **ratios(ratio, ideal),
        }
        rows.append(row)
    return rows


def describe(case: Case, phase: str, setup: Setup, variant: str) -> dict[str, Any]:
    """The columns that name a row."""
    return {
        "model": case.model,
        "length": case.length,
        "batch": case.batch,
        "accumulation": setup.accumulation,
        "dtype": setup.dtype,
        "compile": setup.compile,
        "deterministic": setup.deterministic,
        "phase": phase,
        "variant": variant,
    }


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def run(
    cases: Sequence[Case],
    setup: Setup,
    *,
    stages: Sequence[tuple[str, int]],
    variants: Sequence[Variant],
    steps: int,
    folder: Path,
    budget_s: float = float("inf"),
    profile: bool = False,
    note: str = "",
) -> list[dict[str, Any]]:
    """Measure all cases, print a table for each, and write train_step.csv, .md and .png. Returns the rows.

    stages: pairs of a phase and its micro-batches per step. The CSV is also written after each case of a stage. Cases that
    would begin after `budget_s` seconds, and big models without a GPU, get rows that say so. profile: show where the time of
    dense and drop steps goes in the last stage, whole in profile.txt. note: a sentence for the Markdown file, on the
    conditions of the measurement.
    """
    start, environment = time.perf_counter(), Environment.collect()
    rows: list[dict[str, Any]] = []
    profiles: list[str] = []
    for case, (phase, accumulation) in itertools.product(cases, stages):
        shared = replace(setup, accumulation=accumulation)
        late = time.perf_counter() - start > budget_s
        if late or (setup.device.type == "cpu" and case.model not in ON_A_CPU):
            status = "not measured (time budget)" if late else "not measured (no GPU)"
            rows += [{**describe(case, phase, shared, variant.name), "status": status} for variant in variants]
            continue
        profiled = ("dense", "drop") if profile and (phase, accumulation) == stages[-1] else ()
        results = measure(partial(make_trainer, case.model, shared, phase), case, variants, steps, profiled)
        new = step_rows(case, phase, shared, results)
        new += average_rows(case, phase, shared, new)
        rows += new
        record(folder / "train_step.csv", rows, environment)
        title = f"{case}, {setup.dtype}, accumulation {accumulation}, {PHASES[phase]}"
        for name, result in results.items():
            if result.profile is not None:
                profiles.append(f"{title}, {name}: {result.profile.text()}")
                print(f"\n{name}: {result.profile.text(top=0)}")
        print(f"\n{title} [{time.perf_counter() - start:.0f} s]\n{table(new)}", flush=True)
    record(folder / "train_step.csv", rows, environment)
    (folder / "train_step.md").write_text(markdown(rows, environment, note), encoding="utf-8")
    if profiles:
        (folder / "profile.txt").write_text("\n\n".join(profiles) + "\n", encoding="utf-8")
    title = f"{environment.device}, {setup.dtype}, torch {environment.torch}, commit {environment.commit}"
    plot(folder / "train_step.png", rows, title)
    return rows


def make_trainer(model: str, setup: Setup, phase: str) -> Trainer:
    """A trainer for a phase: "bare" or "engine"."""
    trainer = Trainer(model, setup)
    if phase == "engine":
        trainer.start_engine()
    return trainer


def profile_variant(trainer: Trainer, variant: Variant, case: Case) -> Breakdown:
    """Where the time of a variant's steps goes."""
    trainer.choose(variant, case)
    batches = itertools.cycle(case.batches(trainer.setup.device, BURST))

    def step() -> None:
        trainer.step(next(batches))

    return profile_steps(step, head_rows=case.batch * case.labels, vocabulary=case.shape.vocabulary)


def parse_cases(arguments: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """--cases, or the product of --models, --lengths and --batch; without a GPU, also a small model."""

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
    if not on_gpu and not any(case.model in ON_A_CPU for case in cases):
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
    steps = 24 if torch.cuda.is_available() else 8
    parser.add_argument("--steps", type=int, default=steps, help="timed steps per variant, at least (default %(default)s)")
    parser.add_argument(
        "--accumulation",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="micro-batches per optimizer step of the engine, one or several numbers (default 1)",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    parser.add_argument("--deterministic", action="store_true", help="with kernels that repeat bit for bit")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default %(default)s")


def make_setup(arguments: argparse.Namespace) -> Setup:
    """The run's setup, with defaults that depend on the device."""
    from deepspeed.utils import logger as deepspeed_logger

    on_gpu = torch.cuda.is_available()
    deepspeed_logger.setLevel("WARNING")
    single_process()
    if arguments.deterministic:
        job.be_deterministic()
    return Setup(
        device=torch.device("cuda" if on_gpu else "cpu"),
        dtype=arguments.dtype or ("fp16" if on_gpu else "fp32"),
        compile=on_gpu if arguments.compile is None else arguments.compile,
        deterministic=arguments.deterministic,
    )


def main(argv: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.train_step", description=__doc__, formatter_class=as_written)
    parser.add_argument("--models", default="large,base", help="of large, base, small (default %(default)s)")
    parser.add_argument("--lengths", default="512,128", help="tokens per row (default %(default)s)")
    parser.add_argument("--batch", help="rows per micro-batch; default 32,64 at 512 tokens and 128,256 at 128")
    parser.add_argument("--cases", metavar="MODEL:LENGTH:BATCH,...", help="instead of the three above")
    every = ";".join(variant.name for variant in VARIANTS)
    parser.add_argument("--variants", default=every, metavar="NAME;NAME", help="default: %(default)s")
    parser.add_argument(
        "--engine", action=argparse.BooleanOptionalAction, help="only with the engine, or only without; default: both"
    )
    parser.add_argument("--profile", action="store_true", help="show where the device time of dense and drop steps goes")
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="MINUTES",
        help="begin no case after this time; the rows of those left out say so",
    )
    parser.add_argument("--note", default="", help="a sentence on the conditions, for the Markdown file")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    setup = make_setup(arguments)
    cases = parse_cases(arguments, setup.device.type == "cuda")
    if setup.device.type == "cpu" and arguments.profile:
        parser.error("--profile needs a GPU: run it on a machine with a CUDA device")
    if setup.device.type == "cpu":
        print("No GPU: a small model stands in for the others. Its ratios mean something, its speed does not.")
    stages = [] if arguments.engine else [("bare", 1)]
    if arguments.engine is not False:
        stages += [("engine", accumulation) for accumulation in arguments.accumulation]
    folder = arguments.out / Environment.collect().folder_name
    rows = run(
        cases,
        setup,
        stages=stages,
        variants=parse_variants(arguments.variants),
        steps=arguments.steps,
        folder=folder,
        budget_s=60 * arguments.budget,
        profile=arguments.profile,
        note=arguments.note,
    )
    print("\nwritten: " + ", ".join(str(folder / f"train_step.{suffix}") for suffix in ("csv", "md", "png")))
    without = [row for row in rows if row["status"].startswith("not measured")]
    failed = [row for row in rows if has_failed(row["status"])]
    for line in dict.fromkeys(f"{row['model']} S={row['length']} B={row['batch']}: {row['status']}" for row in without):
        print(line)
    for row in failed:
        print(f"{row['model']} S={row['length']} B={row['batch']}, {row['phase']}, {row['variant']}: {row['status']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
