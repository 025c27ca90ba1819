"""The saving, measured: steps of each mode timed side by side, here on a copy of the model that is thrown away.

`interleave` is how this project times steps, and `start_engine` is what it times them on; the benchmarks use both.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from tqdm import tqdm

from sctd_ds.engine.data_parallel import ScTDEngine
from sctd_ds.engine.initialize import initialize
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.engine.random_state import random_state, set_random_state
from sctd_ds.engine.zero import install, uninstall
from sctd_ds.method.schedule import Mode, mean_cost, modes
from sctd_ds.run.models import build_optimizer, parameter_groups
from sctd_ds.run.settings import RunConfig

logger = logging.getLogger(__name__)

WARMUP = 2
TIMED = "timing steps of each mode"
TELL_SECONDS = 10
"""How often a log hears of slow measurements."""
HUGGING_FACE: Final = "huggingface"
"""In measurements, the step of the untouched model, beside the modes of the method."""

Call = Callable[[], object]


@dataclass
class Timed:
    """What the turns under one name took: ms of every call of every turn, and the peak device memory (None on a CPU)."""

    ms: list[list[float]] = field(default_factory=list)
    work_ms: list[list[float]] = field(default_factory=list)
    """The same without waiting for other processes: on a CPU the processor time of this one, elsewhere the device's, `ms`."""
    peak_bytes: int | None = None


def interleave(
    turns: Mapping[str, Callable[[], Sequence[Call]]], rounds: int, warmup: int = 0, tell: str | None = None
) -> dict[str, Timed]:
    """Take the turns one after the other, again and again (A B C A B C ...), so that a clock that drifts meets all alike.

    turns: by name, a function that prepares the calls to time and returns them. warmup: rounds before the first that counts.
    tell: what is timed, for a progress bar on a terminal and lines in a log; None: nothing is said.
    """
    timed = {name: Timed() for name in turns}
    order = [(number, name) for number in range(warmup + rounds) for name in turns]
    for number, name in order if tell is None else _telling(order, tell):
        ms, work_ms, peak = time_calls(turns[name]())
        if number >= warmup:
            timed[name].ms.append(ms)
            timed[name].work_ms.append(work_ms)
            timed[name].peak_bytes = None if peak is None else max(peak, timed[name].peak_bytes or 0)
    return timed


def _telling(order: Sequence[tuple[int, str]], what: str) -> Iterator[tuple[int, str]]:
    """The same, with a bar on a terminal; elsewhere a line every TELL_SECONDS, so that short work says nothing."""
    quiet = not sys.stderr.isatty() or (dist.is_initialized() and dist.get_rank() > 0)
    last = time.perf_counter()
    with tqdm(order, desc=what, unit="turn", dynamic_ncols=True, leave=False, disable=quiet) as bar:
        for number, (turn, name) in enumerate(bar):
            bar.set_postfix_str(name)
            if bar.disable and time.perf_counter() - last > TELL_SECONDS:
                last = time.perf_counter()
                logger.info("%s: %d of %d turns, now %s", what, number, len(order), name)
            yield turn, name


def time_calls(calls: Sequence[Call]) -> tuple[list[float], list[float], int | None]:
    """Make the calls one after the other: ms of each, its `Timed.work_ms`, and the peak device memory in bytes (None on a CPU).

    Nothing waits for the device in between, as in training: events mark where each call's work ends. Only the first call
    finds the device idle.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        clocks = [(time.perf_counter(), time.process_time())]
        for call in calls:
            call()
            clocks.append((time.perf_counter(), time.process_time()))
        ms, work_ms = ([1e3 * (end - start) for start, end in itertools.pairwise(clock)] for clock in zip(*clocks, strict=True))
        return ms, work_ms, None
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    marks = [accelerator.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    accelerator.synchronize()
    ms = [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
    return ms, ms, accelerator.max_memory_allocated()


def release_memory() -> None:
    """Give freed device memory back, that of unreachable cycles too."""
    gc.collect()
    get_accelerator().empty_cache()


def start_engine(
    model: nn.Module,
    settings: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    parameters: list[dict[str, Any]] | None = None,
) -> Any:
    """The real engine around a converted model (or a pipeline), for timing: it writes no file and skips no step.

    settings: DeepSpeed's. optimizer: None where these name one. parameters: its groups; by default there is one. The engine
    uses the model up.
    """
    left_out = ("sctd", "tensorboard", "wandb", "csv_monitor", "comet")  # the model is converted, and no monitor hears of it
    config = {key: value for key, value in settings.items() if key not in left_out}
    if config.get("fp16", {}).get("enabled"):
        # A dynamic scale starts with overflows, and a skipped update is not the one to time.
        config["fp16"] = {"enabled": True, "loss_scale": 128.0}
    groups = parameters or [{"params": list(model.parameters())}]
    engine, *_ = initialize(model=model, optimizer=optimizer, model_parameters=groups, config=config)
    return engine


def choose_step(engine: Any, mode: Mode, untouched: bool = False) -> None:
    """Make the coming steps of a data-parallel engine those of `mode`.

    untouched: under DeepSpeed's own engine and optimizer, for a model whose own forward was put back. (Ours extend them without
    construction of their own.)
    """
    engine.__class__ = DeepSpeedEngine if untouched else ScTDEngine
    if untouched:
        uninstall(engine.optimizer)
    else:
        install(engine.optimizer, dist.get_world_size(engine.seq_data_parallel_group))
    engine.forced_mode = mode


@dataclass(frozen=True)
class Probe:
    """What a step takes, in ms and bytes, by mode; "huggingface" is the untouched model."""

    step_ms: dict[str, float]
    """One whole optimizer step: accumulation steps x micro-batch + update. That of dense is the median, and each other mode's
    is dense's times the median of the ratios within the rounds, in which the load of the machine cancels."""
    micro_ms: dict[str, list[float]] = field(default_factory=dict)
    """Forward and backward of one micro-batch, every timed repetition."""
    update_ms: float | None = None
    """Optimizer update, the table's included; not measured by itself in a pipeline."""
    bubble_share: dict[str, float] = field(default_factory=dict)
    """In a pipeline: the share of a step that the average rank spends outside of forward and backward passes."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak device memory; empty on a CPU."""

    def time_saved(self, run: RunConfig, against: str = "dense") -> float | None:
        """Share of the baseline's step time that the method's average step saves; None where the baseline was not timed."""
        if against not in self.step_ms:
            return None
        return 1 - mean_cost(run.sctd, self.step_ms) / self.step_ms[against]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int) -> Probe:
    """Time a step of each mode `repeats` times after a warm-up, interleaved, with the run's real engine.

    model: converted, not yet given to DeepSpeed; neither it nor any random state changes. Every rank calls.
    """
    before = random_state()
    measure_steps = _measure_pipeline if run.pretrain.stages > 1 else _measure_data_parallel
    probe = measure_steps(copy.deepcopy(model), run, batches, repeats)
    release_memory()
    set_random_state(before)
    return probe


def _measure_data_parallel(model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int) -> Probe:
    """Time micro-batch and update by themselves, of which a step consists."""
    engine = start_engine(model, _settings(run, accumulation=1), build_optimizer(run, model), parameter_groups(run, model))
    converted, plain = model.forward, types.MethodType(type(model).forward, model)

    def turn(mode: Mode, untouched: bool = False) -> list[Call]:
        batch = {key: value.to(engine.device) for key, value in next(batches).items()}
        model.forward = plain if untouched else converted
        choose_step(engine, mode, untouched)
        return [lambda: engine.backward(engine(**batch).loss), engine.step]

    turns: dict[str, Callable[[], list[Call]]] = {mode: partial(turn, mode) for mode in modes(run.sctd)}
    turns[HUGGING_FACE] = partial(turn, "dense", untouched=True)
    timed = interleave(turns, repeats, WARMUP, tell=TIMED)
    engine.destroy()
    micro_ms = {name: [micro for micro, _ in each.ms] for name, each in timed.items()}
    update_ms = statistics.median(update for mode in modes(run.sctd) for _, update in timed[mode].ms)
    dense_ms = run.accumulation * statistics.median(micro_ms["dense"]) + update_ms
    work = {name: [run.accumulation * micro + update for micro, update in each.work_ms] for name, each in timed.items()}
    return Probe(_relative_to_dense(dense_ms, work), micro_ms, update_ms, peak_bytes=_peaks(timed))


def _measure_pipeline(model: nn.Module, run: RunConfig, batches: Iterator[Mapping[str, Tensor]], repeats: int) -> Probe:
    """Time whole steps: micro-batches overlap in a pipeline, so one alone says nothing."""
    pipeline = Pipeline(model, stages=run.pretrain.stages, length=run.pretrain.seq_length)
    engine = start_engine(
        pipeline, _settings(run, run.accumulation), build_optimizer(run, pipeline), parameter_groups(run, pipeline)
    )
    engine.time_work = True
    work_ms: dict[str, list[float]] = {mode: [] for mode in modes(run.sctd)}

    def step(mode: Mode) -> None:
        engine.train_batch(batches)
        work_ms[mode].append(engine.work_seconds * 1e3)

    def turn(mode: Mode) -> list[Call]:
        engine.forced_mode, engine.work_seconds = mode, 0.0
        return [partial(step, mode)]

    timed = interleave({mode: partial(turn, mode) for mode in modes(run.sctd)}, repeats, WARMUP, tell=TIMED)
    elapsed = {mode: [ms for (ms,) in each.ms] for mode, each in timed.items()}
    step_ms, bubble_share = _relative_to_dense(statistics.median(elapsed["dense"]), elapsed), {}
    for mode in timed:
        work = torch.tensor(statistics.median(work_ms[mode][WARMUP:]), device=engine.device)
        dist.all_reduce(work)
        bubble_share[mode] = 1 - work.item() / run.ranks / step_ms[mode]
    engine.destroy()
    return Probe(step_ms, bubble_share=bubble_share, peak_bytes=_peaks(timed))


def _relative_to_dense(dense_ms: float, rounds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Step times from dense's and the times of every round: see `Probe.step_ms`."""
    ratios = {name: [ms / base for ms, base in zip(each, rounds["dense"], strict=True)] for name, each in rounds.items()}
    return {name: dense_ms * statistics.median(each) for name, each in ratios.items()}


def _peaks(timed: Mapping[str, Timed]) -> dict[str, int]:
    return {name: each.peak_bytes for name, each in timed.items() if each.peak_bytes is not None}


def _settings(run: RunConfig, accumulation: int) -> dict[str, Any]:
    """The run's DeepSpeed settings for `accumulation` micro-batches per step."""
    batch = run.micro_batch * accumulation * run.world_size
    return {**copy.deepcopy(run.deepspeed), "gradient_accumulation_steps": accumulation, "train_batch_size": batch}
