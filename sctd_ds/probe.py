"""The saving, measured: every kind of step, timed side by side on a copy of the model that is thrown away."""

from __future__ import annotations

import copy
import gc
import statistics
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from sctd_ds.config import RunConfig
from sctd_ds.engine import initialize, random_state, set_random_state
from sctd_ds.pipeline import Pipeline
from sctd_ds.schedule import mean_cost

WARMUP = 2
HUGGING_FACE = "huggingface"


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
    """Time each kind of step `repeats` times after a warm-up, interleaved (A B C A B C ...), with the run's real engine.

    model: converted, not yet given to DeepSpeed; neither it nor any random state changes. Every rank calls.
    """
    kinds = ["dense"] if run.sctd.method == "dense" else ["dense", "drop"]
    kinds += ["align"] if run.sctd.method == "sctd" else []
    before = random_state()
    clone = copy.deepcopy(model)
    if run.pretrain.stages > 1:
        probe = _measure_pipeline(clone, run, batches, repeats, kinds)
        set_random_state(before)
        return probe
    engine, *_ = initialize(model=clone, model_parameters=clone.parameters(), config=_settings(run))
    probe = Probe(micro_ms={kind: [] for kind in [*kinds, HUGGING_FACE]})
    update_ms: list[float] = []
    accelerator = get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    plain, ours = types.MethodType(type(clone).forward, clone), clone.forward
    for repeat in range(WARMUP + repeats):
        for kind in probe.micro_ms:
            batch = {key: value.to(engine.device) for key, value in next(batches).items()}
            clone.forward, engine.forced_mode = (plain, "dense") if kind == HUGGING_FACE else (ours, kind)
            if on_device:
                accelerator.reset_peak_memory_stats()
            start = _now(accelerator)
            engine.backward(engine(**batch).loss)
            middle = _now(accelerator)
            engine.step()
            end = _now(accelerator)
            if repeat >= WARMUP:
                probe.micro_ms[kind].append((middle - start) * 1e3)
                update_ms.append((end - middle) * 1e3)
            if on_device:
                probe.peak_bytes[kind] = accelerator.max_memory_allocated()
    probe.update_ms = statistics.median(update_ms)
    for kind, times in probe.micro_ms.items():
        probe.step_ms[kind] = run.accumulation * statistics.median(times) + probe.update_ms
    engine.destroy()
    del engine, clone, plain, ours
    gc.collect()
    accelerator.empty_cache()
    set_random_state(before)
    return probe


def _measure_pipeline(
    model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int, kinds: list[str]
) -> Probe:
    """`measure` for a pipeline, by whole steps: micro-batches overlap, so one alone says nothing. Uses `model` up."""
    pipeline = Pipeline(model, stages=run.pretrain.stages, length=run.pretrain.seq_length)
    engine, *_ = initialize(model=pipeline, model_parameters=pipeline.parameters(), config=_settings(run, run.accumulation))
    probe, accelerator = Probe(), get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    step_ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    work_ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    engine.time_work = True
    for repeat in range(WARMUP + repeats):
        for kind in kinds:
            engine.forced_mode, engine.work_seconds = kind, 0.0
            if on_device:
                accelerator.reset_peak_memory_stats()
            start = _now(accelerator)
            engine.train_batch(batches)
            end = _now(accelerator)
            if repeat >= WARMUP:
                step_ms[kind].append((end - start) * 1e3)
                work_ms[kind].append(engine.work_seconds * 1e3)
            if on_device:
                probe.peak_bytes[kind] = accelerator.max_memory_allocated()
    for kind in kinds:
        probe.step_ms[kind] = statistics.median(step_ms[kind])
        work = torch.tensor(statistics.median(work_ms[kind]), device=engine.device)
        dist.all_reduce(work)
        probe.bubble_share[kind] = 1 - work.item() / run.ranks / probe.step_ms[kind]
    engine.destroy()
    del engine, pipeline
    gc.collect()
    accelerator.empty_cache()
    return probe


def _settings(run: RunConfig, accumulation: int = 1) -> dict[str, Any]:
    """The run's DeepSpeed settings for `accumulation` micro-batches per step, and without files or skipped steps."""
    settings = copy.deepcopy(run.deepspeed)
    settings.pop("sctd", None)  # the model is converted
    settings["gradient_accumulation_steps"] = accumulation
    settings["train_batch_size"] = run.micro_batch * accumulation * run.world_size
    for monitor in ("tensorboard", "wandb", "csv_monitor", "comet"):
        settings.pop(monitor, None)
    if settings.get("fp16", {}).get("enabled"):
        # A dynamic scale starts by overflowing, and a skipped update is not the one to time.
        settings["fp16"] = {"enabled": True, "loss_scale": 128.0}
    return settings


def _now(accelerator: Any) -> float:
    accelerator.synchronize()
    return time.perf_counter()
