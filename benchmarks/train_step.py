"""What one training step costs: every kind of step side by side, in one process, against dense and untouched Hugging Face.

    python -m benchmarks.train_step                                   # base and large, S 128 and 512 (a GPU)
    python -m benchmarks.train_step --cases large:512:64 --profile    # one case, and where its time goes

Two measurements: "bare" is forward and backward of one micro-batch; "engine" is a whole optimizer step of the real engine
(DeepSpeed, ZeRO-2, AdamW, gradient clipping, the importance table). Variants take turns (A B C A B C ...) in bursts of a
few steps, so that a drifting clock meets all of them. Inputs are random ids with exactly the labels per row that
pretraining has; results go to <out>/<device>/ as CSV and PNG.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import socket
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import BertConfig, BertForMaskedLM

import sctd_ds
from benchmarks.harness import RESULTS, Environment, write_csv
from benchmarks.profiling import UPDATE, profile_steps
from sctd_ds.config import ScTDConfig
from sctd_ds.encoder import state_of
from sctd_ds.report import PEAK_FLOPS
from sctd_ds.schedule import Mode, Shape, aligned_rows, mean_cost, sequence_flops

VOCABULARY = 30528  # BERT's 30522 as pretrain.py pads it, for every variant
MODELS: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "small": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024,
              "vocab_size": 4096},
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
INTERVALS = (5, 10, 20, 50)
BURST = 4
"""Steps of one turn. They follow each other without a wait, as in training; only the first starts with an idle device."""
PHASES = {"bare": "forward and backward of one micro-batch", "engine": "whole optimizer step (ZeRO-2, AdamW)"}
HUGGING_FACE, HUGGING_FACE_COMPILED = "huggingface", "huggingface compiled"
ALIGN, SEPARATE = "align", "align, separate prefix"


@dataclass(frozen=True)
class Variant:
    """One kind of step: what the model's forward is, the mode, and how the method's settings differ from the default."""

    name: str
    mode: Mode = "dense"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether the converted model runs, not the untouched one."""
        return not self.name.startswith(HUGGING_FACE)


VARIANTS = (
    Variant(HUGGING_FACE),
    Variant(HUGGING_FACE_COMPILED),
    Variant("dense"),
    Variant("drop", "drop"),
    Variant(ALIGN, "align"),
    Variant(SEPARATE, "align", {"shared_prefix": False}),
    Variant("align, recomputed", "align", {"recompute_align": True}),
    Variant("spread", "align", {"align_schedule": "spread"}),
)


@dataclass(frozen=True, order=True)
class Case:
    """A model by name, S tokens per row, B rows per micro-batch."""

    model: str
    length: int
    batch: int

    @property
    def labels(self) -> int:
        """Labelled tokens per row: as many as `sctd_ds.data.Masker` chooses at 15 %."""
        return max(1, round(0.15 * (self.length - 2)))

    @property
    def shape(self) -> Shape:
        size = MODELS[self.model]
        vocabulary = size.get("vocab_size", VOCABULARY)
        return Shape(size["num_hidden_layers"], size["hidden_size"], size["intermediate_size"], vocabulary, self.length,
                     self.labels)  # fmt: skip

    def config(self, variant: Variant) -> ScTDConfig:
        return ScTDConfig(keep_token_ids=[0, 1, 2, 3], labels_per_row=self.labels, **variant.settings)

    def flops(self, variant: Variant) -> float:
        """Operations of one sequence as the variant computes them: the untouched model's head runs on every token."""
        rows = None if variant.ours else self.length
        return sequence_flops(self.shape, self.config(variant), variant.mode, rows)

    def batches(self, device: torch.device, count: int = 4) -> list[dict[str, Tensor]]:
        """Random rows, always the same: input_ids [B, S] and labels [B, S] with exactly `labels` labelled tokens a row."""
        generator = torch.Generator().manual_seed(0)
        vocabulary, made = self.shape.vocabulary, []
        for _ in range(count):
            ids = torch.randint(4, vocabulary, (self.batch, self.length), generator=generator)
            chosen = 1 + torch.rand(self.batch, self.length - 1, generator=generator).argsort(1)[:, : self.labels]
            labels = torch.full_like(ids, -100).scatter(1, chosen, ids.gather(1, chosen))
            ids.scatter_(1, chosen, 3)
            made.append({"input_ids": ids.to(device), "labels": labels.to(device)})
        return made

    def __str__(self) -> str:
        return f"{self.model} S={self.length} B={self.batch}"


@dataclass(frozen=True)
class Setup:
    """What all variants of a run share."""

    device: torch.device
    dtype: str
    compile: bool
    accumulation: int = 1

    @property
    def peak_flops(self) -> float | None:
        """The device's dense 16-bit peak; None where it is not known or does not apply."""
        if self.device.type != "cuda" or self.dtype == "fp32":
            return None
        name = torch.cuda.get_device_name()
        return next((value for key, value in PEAK_FLOPS.items() if key in name), None)


@dataclass
class Measured:
    """Times of one variant's steps in ms, its peak device memory, and the seconds of its first step (compilation)."""

    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_s: float = 0.0
    status: str = "measured"


class Trainer:
    """One model that can take a step of any variant, without an engine at first and with one after `start_engine`."""

    def __init__(self, model: str, setup: Setup) -> None:
        self.setup = setup
        size = {"vocab_size": VOCABULARY, **MODELS[model]}
        torch.manual_seed(0)
        with setup.device:
            built = BertForMaskedLM(BertConfig(**size, attn_implementation="sdpa"))
        self.model: nn.Module = built.to(DTYPES[setup.dtype]).train()
        sctd_ds.convert(self.model, ScTDConfig(keep_token_ids=[0, 1, 2, 3]))
        self.engine: Any = None
        self._steps = 0
        self.variant = VARIANTS[0]
        plain = type(self.model).forward
        self._forwards = {True: self.model.forward, HUGGING_FACE: types.MethodType(plain, self.model)}
        if setup.compile:
            # Every pair of S and B is a graph of its own.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            state_of(self.model).encoder.compile()
            compiled = torch.compile(plain, dynamic=False)
            self._forwards[HUGGING_FACE_COMPILED] = types.MethodType(compiled, self.model)

    def start_engine(self) -> None:
        """Put the real engine around the model, with the settings of ds_configs/ and torch's fused AdamW."""
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # enters DeepSpeed's own bookkeeping only; batches come as they are
            "gradient_accumulation_steps": self.setup.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.01, "torch_adam": True, "fused": True}},
            "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": self.setup.device.type == "cuda"},
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
        }
        if self.setup.dtype == "fp16":
            # A dynamic scale starts by overflowing, and a skipped update is not the one to time.
            settings["fp16"] = {"enabled": True, "loss_scale": 128.0}
        elif self.setup.dtype == "bf16":
            settings["bf16"] = {"enabled": True}
        self.engine, *_ = sctd_ds.initialize(model=self.model, model_parameters=self.model.parameters(), config=settings)
        self._engine_class = type(self.engine)

    def choose(self, variant: Variant, case: Case) -> None:
        """Make the next steps those of `variant`."""
        self.variant = variant
        self.model.forward = self._forwards[True if variant.ours else variant.name]
        state_of(self.model).config = case.config(variant)
        if self.engine is not None:
            # The untouched model trains under DeepSpeed's own engine, which ours extends without construction of its own.
            self.engine.__class__ = self._engine_class if variant.ours else DeepSpeedEngine
            self.engine.forced_mode = variant.mode

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One step on the device, not waited for: with the engine all micro-batches of an update and the update."""
        self._steps += 1
        if self.engine is None:
            if self.variant.ours:
                sctd_ds.set_mode(self.model, self.variant.mode, self._steps)
            self.model(**batch).loss.backward()
            self.model.zero_grad(set_to_none=True)
            return
        for _ in range(self.setup.accumulation):
            self.engine.backward(self.engine(**batch).loss)
            with record_function(UPDATE):
                self.engine.step()

    def close(self) -> None:
        """Give the memory back."""
        if self.engine is not None:
            self.engine.destroy()
        self.__dict__.clear()
        release_memory()


def measure(trainer: Trainer, case: Case, variants: Sequence[Variant], steps: int) -> dict[str, Measured]:
    """Time at least `steps` steps of each variant after a warm-up, interleaved.

    A variant that runs out of memory is marked so and leaves; with an engine the others are then measured from the start,
    because an interrupted backward pass leaves DeepSpeed's buckets half filled: OutOfMemory asks for a new trainer.
    """
    batches = case.batches(trainer.setup.device)
    results = {variant.name: Measured() for variant in variants}
    for variant in variants:
        warm_up(trainer, case, variant, batches, results[variant.name])
    for _ in range(-(-steps // BURST)):
        for variant in variants:
            trainer.choose(variant, case)
            times, peak = burst(trainer, batches, BURST)
            result = results[variant.name]
            result.ms += times
            result.peak_bytes = None if peak is None else max(peak, result.peak_bytes or 0)
    return results


def warm_up(trainer: Trainer, case: Case, variant: Variant, batches: list[dict[str, Tensor]], result: Measured) -> None:
    """First steps of a variant: compilation, every shape that it has, the allocator's growth."""
    trainer.choose(variant, case)
    config = case.config(variant)
    counts = {len(aligned_rows(config, step, case.batch)) for step in range(config.interval)}
    start = time.perf_counter()
    burst(trainer, batches, 1)
    result.first_s = time.perf_counter() - start
    # Rows of a "spread" step differ by one from step to step unless the interval divides the batch.
    burst(trainer, batches, 2 if len(counts) == 1 else config.interval)


def burst(trainer: Trainer, batches: Sequence[Mapping[str, Tensor]], count: int) -> tuple[list[float], int | None]:
    """`count` consecutive steps: ms of each, by device events on a GPU, and the peak device memory in bytes."""
    if trainer.setup.device.type != "cuda":
        times = []
        for i in range(count):
            start = time.perf_counter()
            trainer.step(batches[i % len(batches)])
            times.append((time.perf_counter() - start) * 1e3)
        return times, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for i in range(count):
        trainer.step(batches[i % len(batches)])
        marks[i + 1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return times, torch.cuda.max_memory_allocated()


def measure_surviving(
    trainer: Trainer, renew: Callable[[], Trainer], case: Case, variants: Sequence[Variant], steps: int
) -> tuple[dict[str, Measured], Trainer]:
    """`measure`, with variants that run out of memory as rows of their own. Returns the trainer to go on with."""
    lost: dict[str, Measured] = {}
    remaining = list(variants)
    while True:
        try:
            return {**measure(trainer, case, remaining, steps), **lost}, trainer
        except torch.OutOfMemoryError:
            failed = trainer.variant
        # Outside the except block: the traceback no longer holds the step's tensors.
        lost[failed.name] = Measured(status="out of memory")
        remaining.remove(failed)
        had_engine = trainer.engine is not None
        trainer.close()
        trainer = renew()
        if had_engine:
            trainer.start_engine()


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_rows(case: Case, phase: str, setup: Setup, results: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """One row of figures per variant. Ratios are of median step times; "ideal" ratios are of operations (sctd_ds.schedule).

    saving_reached: measured saving / ideal saving against our dense step, for variants that ideally save.
    """
    by_name = {variant.name: variant for variant in VARIANTS}
    sequences = case.batch * (setup.accumulation if phase == "engine" else 1)
    # Steps of "spread" differ by design (some have one aligned row more), so that theirs is a mean.
    middle = {name: statistics.mean if name == "spread" else statistics.median for name in results}
    median = {name: middle[name](result.ms) for name, result in results.items() if result.ms}
    rows = []
    for name, result in results.items():
        variant = by_name[name]
        row: dict[str, Any] = {**describe(case, phase, setup, name), "status": result.status}
        rows.append(row)
        if name not in median:
            continue
        ms = median[name]
        p20, p80 = quantiles(result.ms)
        rate = sequences / ms * 1e3
        row |= {
            "ms": ms, "ms_p20": p20, "ms_p80": p80, "ms_min": min(result.ms), "steps": len(result.ms),
            "sequences_per_s": rate, "tokens_per_s": rate * case.length, "model_tflops": rate * case.flops(variant) / 1e12,
            "mfu": rate * case.flops(variant) / setup.peak_flops if setup.peak_flops else None,
            "peak_gib": result.peak_bytes / 2**30 if result.peak_bytes else None, "first_step_s": result.first_s,
            "speed_against_huggingface": median[HUGGING_FACE] / ms if HUGGING_FACE in median else None,
        }  # fmt: skip
        if "dense" in median and variant.ours:
            ideal = case.flops(variant) / case.flops(by_name["dense"])
            row |= {"ratio": ms / median["dense"], "ideal_ratio": ideal, "ratio_over_ideal": ms / median["dense"] / ideal}
            row["saving_reached"] = (1 - row["ratio"]) / (1 - ideal) if ideal < 1 else None
    return rows


def average_rows(case: Case, phase: str, setup: Setup, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows like those of `step_rows` for ScTD as a whole: drop and align steps as they were measured, mixed by the schedule."""
    measured = {row["variant"]: row for row in steps if "ratio" in row}
    if not {"dense", "drop"} <= measured.keys():
        return []
    rows = []
    for align in (ALIGN, SEPARATE):
        if align not in measured:
            continue
        for interval in INTERVALS:
            row = describe(case, phase, setup, f"sctd Fi={interval}" + ("" if align == ALIGN else ", separate prefix"))

            def average(key: str, interval: int = interval, align: str = align) -> float:
                costs = {"dense": measured["dense"][key], "drop": measured["drop"][key], "align": measured[align][key]}
                return mean_cost(ScTDConfig(interval=interval), costs)

            ms, ratio, ideal = average("ms"), average("ratio"), average("ideal_ratio")
            rate = measured["dense"]["sequences_per_s"] / ratio
            huggingface = measured["dense"]["speed_against_huggingface"]
            rows.append(row | {
                "status": "from drop and align", "ms": ms, "sequences_per_s": rate, "tokens_per_s": rate * case.length,
                "speed_against_huggingface": huggingface / ratio if huggingface else None,
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
"""Column of the CSV -> heading and format of the printed table; a row without times prints its status."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for row in rows:
        cells = ["" if row.get(key) is None else text(row[key]) for key, (_, text) in COLUMNS.items()]
        if row.get("ms") is None:
            cells[1] = row["status"]
        lines.append(cells)
    # A status may run over the empty cells to its right.
    widths = [max(len(line[i]) for line in lines if i == 0 or line[2] or line is lines[0]) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


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
        spread = [[row["ms"] - row["ms_p20"] for row in chosen], [row["ms_p80"] - row["ms"] for row in chosen]]
        colors = ["tab:gray" if name.startswith(HUGGING_FACE) else "tab:blue" for name in names]
        axis.bar_label(axis.barh(names, ms, xerr=spread, color=colors), fmt="%.1f", padding=3, fontsize=8)
        dense = next((row["ms"] for row in chosen if row["variant"] == "dense"), None)
        ideal = [(dense * row["ideal_ratio"], row["variant"]) for row in chosen if row.get("ideal_ratio")]
        if ideal:
            axis.plot(*zip(*ideal, strict=True), "|", color="tab:orange", ms=18, mew=2)
        axis.invert_yaxis()
        axis.set(title=f"{model}, S={length}, B={batch}, {phase}", xlabel="ms per step", xlim=(0, 1.2 * max(ms)))
    figure.suptitle(f"{title}\norange: our dense step x ratio of operations", fontsize=9)
    figure.savefig(path, dpi=110)


def run(
    cases: Sequence[Case], setup: Setup, *, phases: Sequence[str], variants: Sequence[Variant], steps: int, folder: Path,
    budget_s: float = float("inf"), profile: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure all cases, print a table for each, and write train_step.csv and train_step.png after each. Returns the rows.

    Cases whose turn comes after `budget_s` seconds, and big models without a GPU, become rows that say so.
    """
    start, environment = time.perf_counter(), Environment.collect()
    if not setup.compile:
        variants = [variant for variant in variants if variant.name != HUGGING_FACE_COMPILED]
    rows: list[dict[str, Any]] = []

    def skip(case: Case, phase: str, status: str) -> None:
        rows.extend({**describe(case, phase, setup, variant.name), "status": status} for variant in variants)

    for model in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == model]
        if setup.device.type == "cpu" and model != "small":
            for phase in phases:
                for case in own:
                    skip(case, phase, "not measured (no GPU)")
            continue

        def build(model: str = model) -> Trainer:
            return Trainer(model, setup)

        trainer = build()
        for phase in phases:
            if phase == "engine":
                trainer.start_engine()
            for case in own:
                if time.perf_counter() - start > budget_s:
                    skip(case, phase, "not measured (time budget)")
                    continue
                results, trainer = measure_surviving(trainer, build, case, variants, steps)
                new = step_rows(case, phase, setup, results)
                averages = average_rows(case, phase, setup, new)
                rows += new + averages
                print(f"\n{case}, {setup.dtype}, {PHASES[phase]} [{time.perf_counter() - start:.0f} s]", flush=True)
                print(table([*new, *averages]), flush=True)
                record(folder / "train_step.csv", rows, environment)
                if profile and phase == phases[-1]:
                    for variant in (v for v in variants if v.name in ("dense", "drop") and results[v.name].ms):
                        trainer.choose(variant, case)
                        print(f"\n{case}, {phase}, {variant.name}: {profile_trainer(trainer, case)}", flush=True)
        trainer.close()
    record(folder / "train_step.csv", rows, environment)
    title = f"{environment.device}, {setup.dtype}, torch {environment.torch}, commit {environment.commit}"
    plot(folder / "train_step.png", rows, title)
    return rows


def profile_trainer(trainer: Trainer, case: Case) -> str:
    """Where the time of the chosen variant's steps goes, as text."""
    batches = case.batches(trainer.setup.device)
    turn = iter(range(1_000_000))
    report = profile_steps(lambda: trainer.step(batches[next(turn) % len(batches)]),
                           head_rows=case.batch * case.labels, vocabulary=case.shape.vocabulary)  # fmt: skip
    return report.text()


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
    known = {variant.name for variant in VARIANTS}
    for name in wanted:
        if name not in known:
            raise SystemExit(f'unknown variant "{name}": expected some of {"; ".join(sorted(known))}, separated by ";"')
    return [variant for variant in VARIANTS if variant.name in wanted]


def single_process() -> None:
    """Tell DeepSpeed that this process is the only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in alone.items():
        os.environ.setdefault(key, str(value))


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
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    setup = make_setup(arguments)
    cases = parse_cases(arguments, setup.device.type == "cuda")
    if setup.device.type == "cpu":
        print("No GPU: a small model stands in for the others. Its ratios mean something, its speed does not.")
    phases = {None: ("bare", "engine"), True: ("engine",), False: ("bare",)}[arguments.engine]
    folder = arguments.out / Environment.collect().folder_name
    rows = run(cases, setup, phases=phases, variants=parse_variants(arguments.variants), steps=arguments.steps, folder=folder,
               budget_s=60 * arguments.budget, profile=arguments.profile)  # fmt: skip
    for line in dict.fromkeys(f"{r['model']} S={r['length']} B={r['batch']}: {r['status']}" for r in rows if not r.get("ms")):
        print(line)
    print(f"\nwritten: {folder / 'train_step.csv'}, {folder / 'train_step.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
