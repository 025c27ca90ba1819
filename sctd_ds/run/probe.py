"""The saving, measured: kinds of steps timed side by side, here on a copy of the model that is thrown away.

`interleave` is how this project times steps; the benchmarks use it too.
"""

from __future__ import annotations

import copy
import gc
import itertools
import statistics
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from sctd_ds.engine.initialize import initialize
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.engine.random_state import random_state, set_random_state
from sctd_ds.method.schedule import mean_cost
from sctd_ds.run.models import build_optimizer
from sctd_ds.run.settings import RunConfig

WARMUP = 2
HUGGING_FACE = "huggingface"
STATIC_FP16 = {"enabled": True, "loss_scale": 128.0}
"""DeepSpeed's fp16 block for timing: a dynamic scale starts by overflowing, and a skipped update is not the one to time."""

Call = Callable[[], object]


@dataclass
class Timed:
    """What the turns of one kind took: ms of every call of every turn, and the peak device memory (None on a CPU)."""

    ms: list[list[float]] = field(default_factory=list)
    peak_bytes: int | None = None


def interleave(turns: Mapping[str, Callable[[], Sequence[Call]]], rounds: int, warmup: int = 0) -> dict[str, Timed]:
    """Let the kinds take turns (A B C A B C ...), so that a clock that drifts meets all of them alike.

    turns: by kind, what makes ready and returns the calls to time. warmup: rounds before the first that counts.
    """
    timed = {kind: Timed() for kind in turns}
    for number in range(warmup + rounds):
        for kind, prepare in turns.items():
            ms, peak = time_calls(prepare())
            if number >= warmup:
                timed[kind].ms.append(ms)
                timed[kind].peak_bytes = None if peak is None else max(peak, timed[kind].peak_bytes or 0)
    return timed


def time_calls(calls: Sequence[Call]) -> tuple[list[float], int | None]:
    """Make the calls one after the other: ms of each, and the peak device memory in bytes (None on a CPU).

    A device is not waited for in between, as in training: events mark where each call's work ends. Only the first call finds
    the device idle.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        seconds = [time.perf_counter()]
        for call in calls:
            call()
            seconds.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(seconds)], None
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    marks = [accelerator.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    accelerator.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)], accelerator.max_memory_allocated()


def release_memory() -> None:
    """Give freed device memory back, that of unreachable cycles too."""
    gc.collect()
    get_accelerator().empty_cache()


@dataclass
class Probe:
    """Medians over the timed steps, in ms and bytes. "dense" is our own dense step; "huggingface" the untouched model."""

    step_ms: dict[str, float] = field(default_factory=dict)
    """Time of one whole optimizer step by kind: accumulation steps x micro-batch + update."""
    micro_ms: dict[str, list[float]] = field(default_factory=dict)
    """Forward and backward of one micro-batch by kind, every timed repetition."""
    update_ms: float | None = None
    """Optimizer update, the table's included; not measured by itself in a pipeline."""
    bubble_share: dict[str, float] = field(default_factory=dict)
    """In a pipeline, by kind: the share of a step that the average rank spends outside of forward and backward passes."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak device memory by kind; empty on a CPU."""

    def time_saved(self, run: RunConfig, against: str = "dense") -> float:
        """Fraction of the baseline's step time that the method's average step saves."""
        return 1 - mean_cost(run.sctd, self.step_ms) / self.step_ms[against]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int) -> Probe:
    """Time each kind of step `repeats` times after a warm-up, interleaved, with the run's real engine.

    model: converted, not yet given to DeepSpeed; neither it nor any random state changes. Every rank calls.
    """
    kinds = ["dense"] if run.sctd.method == "dense" else ["dense", "drop"]
    kinds += ["align"] if run.sctd.method == "sctd" else []
    before = random_state()
    measure_kinds = _measure_pipeline if run.pretrain.stages > 1 else _measure_parts
    probe = measure_kinds(copy.deepcopy(model), run, batches, repeats, kinds)
    release_memory()
    set_random_state(before)
    return probe


def _measure_parts(
    model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int, kinds: list[str]
) -> Probe:
    """Micro-batch and update by themselves, of which a step is made. Uses `model` up."""
    optimizer = build_optimizer(run, model)
    engine, *_ = initialize(model=model, optimizer=optimizer, model_parameters=model.parameters(), config=_settings(run))
    plain, ours = types.MethodType(type(model).forward, model), model.forward

    def turn(kind: str) -> list[Call]:
        batch = {key: value.to(engine.device) for key, value in next(batches).items()}
        model.forward, engine.forced_mode = (plain, "dense") if kind == HUGGING_FACE else (ours, kind)
        return [lambda: engine.backward(engine(**batch).loss), engine.step]

    timed = interleave({kind: partial(turn, kind) for kind in [*kinds, HUGGING_FACE]}, repeats, WARMUP)
    engine.destroy()
    micro_ms = {kind: [micro for micro, _ in each.ms] for kind, each in timed.items()}
    update_ms = statistics.median(update for each in timed.values() for _, update in each.ms)
    step_ms = {kind: run.accumulation * statistics.median(ms) + update_ms for kind, ms in micro_ms.items()}
    return Probe(step_ms, micro_ms, update_ms, peak_bytes=_peaks(timed))


def _measure_pipeline(
    model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int, kinds: list[str]
) -> Probe:
    """Whole steps: micro-batches overlap in a pipeline, so one alone says nothing. Uses `model` up."""
    pipeline = Pipeline(model, stages=run.pretrain.stages, length=run.pretrain.seq_length)
    settings, optimizer = _settings(run, run.accumulation), build_optimizer(run, pipeline)
    engine, *_ = initialize(model=pipeline, optimizer=optimizer, model_parameters=pipeline.parameters(), config=settings)
    engine.time_work = True
    work_ms: dict[str, list[float]] = {kind: [] for kind in kinds}

    def step(kind: str) -> None:
        engine.train_batch(batches)
        work_ms[kind].append(engine.work_seconds * 1e3)

    def turn(kind: str) -> list[Call]:
        engine.forced_mode, engine.work_seconds = kind, 0.0
        return [partial(step, kind)]

    timed = interleave({kind: partial(turn, kind) for kind in kinds}, repeats, WARMUP)
    probe = Probe(peak_bytes=_peaks(timed))
    for kind, each in timed.items():
        probe.step_ms[kind] = statistics.median(ms for (ms,) in each.ms)
        work = torch.tensor(statistics.median(work_ms[kind][WARMUP:]), device=engine.device)
        dist.all_reduce(work)
        probe.bubble_share[kind] = 1 - work.item() / run.ranks / probe.step_ms[kind]
    engine.destroy()
    return probe


def _peaks(timed: Mapping[str, Timed]) -> dict[str, int]:
    return {kind: each.peak_bytes for kind, each in timed.items() if each.peak_bytes is not None}


def _settings(run: RunConfig, accumulation: int = 1) -> dict[str, Any]:
    """The run's DeepSpeed settings for `accumulation` micro-batches per step, and without files or skipped steps."""
    settings = copy.deepcopy(run.deepspeed)
    settings.pop("sctd", None)  # the model is converted
    settings["gradient_accumulation_steps"] = accumulation
    settings["train_batch_size"] = run.micro_batch * accumulation * run.world_size
    for monitor in ("tensorboard", "wandb", "csv_monitor", "comet"):
        settings.pop(monitor, None)
    if settings.get("fp16", {}).get("enabled"):
        settings["fp16"] = STATIC_FP16
    return settings
