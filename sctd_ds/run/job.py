"""The pieces of a pretraining job that pretrain.py puts together: its data, its shape, its forecast."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import transformers

from sctd_ds import data
from sctd_ds.config import ConfigError, counted
from sctd_ds.engine import ranks
from sctd_ds.method.flops import Shape, flops_saved
from sctd_ds.method.schedule import dense_phases, mean_cost
from sctd_ds.run import models, report, settings
from sctd_ds.run.memory import Machine, compute
from sctd_ds.run.probe import Probe
from sctd_ds.run.settings import RunConfig

logger = logging.getLogger(__name__)

ANNOUNCED = 1000
"""Megabytes of data from which their check is announced, because it takes seconds."""


def load(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), world_size: int = 1, method: str | None = None
) -> RunConfig:
    """The run that a configuration file describes, checked as far as nothing has to be built. See `settings.load`."""
    run = settings.load(source, overrides, world_size, method)
    models.check(run)
    return run


def check_files(spec: str | list[str], run: RunConfig) -> None:
    """DataError or ConfigError for data, a tokenizer or a model that cannot be used, as far as it shows in a moment: nothing is
    built, and no text or weights are read."""
    options = run.pretrain
    models.check_weights(options)
    data.check(spec, tokenizer=options.tokenizer or options.trained_model, seq_length=options.seq_length, rows=run.global_batch)


def be_deterministic() -> None:
    """Choose kernels that add in one order only, so that a GPU repeats bit for bit. Call this before any matrix product."""
    import torch._inductor.config
    import torch.utils.deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    # Not warn_only: only the strict mode makes attention's backward deterministic.
    torch.use_deterministic_algorithms(True)
    # Filling memory is a guard against reading it uninitialized, which nothing here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._inductor.config.deterministic = True  # kernels are not chosen by their time


def prepare_data(spec: str | list[str], run: RunConfig) -> data.PackedData:
    """Built data, or raw text built once into data/cache: rank 0 works, the others wait. Raises DataError on every rank.

    Every start reads all of the data once, to see that it is what was built.
    """
    options = run.pretrain

    def build() -> str:
        # Without the run's seed: runs on one text hold out the same part of it, so their losses can be compared.
        path = data.prepare(
            spec,
            Path("data") / "cache",
            tokenizer=options.tokenizer or options.trained_model,
            vocab_size=options.vocab_size,
            lowercase=not options.cased,
            seq_length=options.seq_length,
            text_column=options.text_column,
            validation_fraction=options.validation_fraction,
            dedup=options.dedup,
        )
        megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        if megabytes > ANNOUNCED:
            logger.info("%s: reading %.0f MB once, to see that they are as they were built", path, megabytes)
        start = time.perf_counter()
        data.load(path, seq_length=options.seq_length, verify=True)
        logger.info("%s: %.1f MB are as they were built (SHA-256, %.1f s)", path, megabytes, time.perf_counter() - start)
        return str(path)

    def load() -> data.PackedData:
        if not path.exists():
            raise data.DataError(
                f"{path.absolute()} is not on {socket.gethostname()}, and every node needs the data: build them with "
                "`python -m sctd_ds.data build` in a folder that all nodes share, or copy them there, and name it in --data"
            )
        data.check(str(path), seq_length=options.seq_length, rows=run.global_batch)
        packed = data.load(path)
        if options.trained_model:
            data.check_tokenizer(packed, options.trained_model)
        return packed

    path = Path(ranks.on_first(build))
    packed = ranks.on_all(load)
    fingerprint = ranks.on_first(lambda: packed.meta.fingerprint)
    ranks.on_all(lambda: _refuse_other(packed, fingerprint))
    return packed


def _refuse_other(packed: data.PackedData, fingerprint: str) -> None:
    """DataError for data other than those that the first rank reads: a node may have its own at the same path."""
    if packed.meta.fingerprint != fingerprint:
        raise data.DataError(
            f"{packed.path.absolute()} on {socket.gethostname()} holds other data than that of the first rank: copy that there"
        )


def make_batches(
    run: RunConfig, packed: data.PackedData, rank: int
) -> tuple[data.Loader, Callable[[float], Iterator[data.MicroBatch]]]:
    """This rank's training batches, and a function that gives its validation batches at a mask rate, the same each time."""
    options = run.pretrain
    masker = partial(data.Masker, packed.tokenizer, options.seed)
    # DeepSpeed numbers ranks stage by stage; all stages of a pipeline read the same rows.
    replica, world = rank % run.world_size, run.world_size
    loader = data.Loader(
        packed.train,
        masker(options.mlm_probability),
        micro_batch=run.micro_batch,
        accumulation=run.accumulation,
        rank=replica,
        world=world,
        seed=options.seed,
        num_workers=options.num_workers,
    )
    max_batches = math.ceil(options.validation_rows / run.micro_batch)

    def validation(rate: float) -> Iterator[data.MicroBatch]:
        return data.validation_batches(
            packed.validation, masker(rate), batch_size=run.micro_batch, rank=replica, world=world, max_batches=max_batches
        )

    return loader, validation


def shape_of(run: RunConfig, packed: data.PackedData) -> Shape:
    """The sizes that decide a step's cost."""
    sizes = models.sizes(run.pretrain, packed.tokenizer)
    return Shape.of(sizes, length=run.pretrain.seq_length, labels=models.labels_per_row(run, packed))


def describe(model: transformers.PreTrainedModel, run: RunConfig, packed: data.PackedData) -> str:
    """The line a run starts with."""
    options = run.pretrain
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters"
    if options.trained_model:
        size += f" of {options.trained_model}"
    rows = f"{len(packed.train):,} rows of {options.seq_length} tokens to train on, {len(packed.validation):,} to validate"
    dense = " and ".join(f"{first} to {last}" for first, last in dense_phases(run.sctd))
    phases = f"; steps {dense} are dense" if dense else ""
    return f"{run.name}: {size}, {rows}; a step is {_step(run)}{phases}"


def _step(run: RunConfig) -> str:
    """What a step consists of."""
    stages = f" of {run.pretrain.stages} stages"
    replica = ("rank", "ranks") if run.pretrain.stages == 1 else (f"pipeline{stages}", f"pipelines{stages}")
    parts = (run.world_size, *replica), (run.micro_batch, "row", "rows"), (run.accumulation, "micro-batch", "micro-batches")
    return " x ".join(counted(*part) for part in parts)


def forecast(run: RunConfig, packed: data.PackedData, measured: Probe) -> str:
    """What a dry run prints: step time by mode, saving, the whole run's time, memory."""
    shape = shape_of(run, packed)
    lines = report.saving_lines(report.build(run, shape, measured))
    hours = mean_cost(run.sctd, measured.step_ms) * run.pretrain.steps / 3.6e6
    lines.append(f"  whole run        {run.pretrain.steps:,} steps, about {hours:,.1f} hours on this device")
    for mode, size in measured.peak_bytes.items():
        lines.append(f"  peak memory      {mode}: {size / 2**30:.1f} GiB")
    if not measured.peak_bytes:
        share = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        try:
            lines += compute(run, packed, gpu=False).lines(Machine("this machine, for each of its ranks", run.ranks, share))
        except ConfigError as error:
            lines.append(f"  memory           {error}")
    return "\n".join(lines)


def forecast_elsewhere(run: RunConfig, packed: data.PackedData, machine: Machine) -> str:
    """What a dry run says about another machine. Raises ConfigError for a run whose memory cannot be computed."""
    needs = compute(run, packed, gpu=True)
    lines = [f"  on {counted(machine.devices, 'device', 'devices'):<14}a step is {_step(run)}", *needs.lines(machine)]
    lines.append(f"  operations saved {flops_saved(shape_of(run, packed), run.sctd):.1%} against our dense step")
    return "\n".join([*lines, "  times            not measured: they need that machine"])
