"""Pretrain a BERT with token dropping and semantic-consistent learning.

    sctd pretrain --deepspeed_config tiny                                       # one process
    deepspeed pretrain.py --deepspeed_config ds_configs/large.json             # one for each GPU, from a checkout
    deepspeed --module sctd_ds pretrain --deepspeed_config large               # the same, from the installed package

torchrun, srun and Accelerate work too (docs/cluster.md). One JSON file describes the run: DeepSpeed's keys, a "sctd" block (the
method) and a "pretrain" block (model, data, length).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import logger as deepspeed_logger

import sctd_ds
from sctd_ds import data
from sctd_ds.config import ConfigError, Method
from sctd_ds.engine import checkpoint, place, ranks
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.engine.step import NonFiniteLossError, TrainingError
from sctd_ds.eval import EvalError, training
from sctd_ds.integrations import schedules
from sctd_ds.run import control, job, lock, memory, models, output, probe, report, samples, stop, validation
from sctd_ds.run.metrics import Metrics, take_monitor
from sctd_ds.run.settings import RunConfig, shipped

logger = logging.getLogger("pretrain")

EPILOG = """\
A run that was stopped (Ctrl-C, SIGTERM, SIGHUP, a lost machine) continues exactly when you start the same command again.
Exit status: 0 finished, 2 bad input or a file that cannot be written, 3 training failed, 143 stopped by a signal after a
checkpoint."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sctd pretrain", description=__doc__, epilog=EPILOG, formatter_class=as_written)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # set by the launcher

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--deepspeed_config",
        required=True,
        metavar="FILE",
        help=f"the JSON file that describes the run, or the name of one that comes with this package: {', '.join(shipped())}",
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the file, for example sctd.interval=20 or pretrain.steps=1000; repeatable",
    )
    run.add_argument(
        "--data", nargs="+", metavar="SOURCE", help="a built data folder, or raw text; replaces the file's pretrain.data"
    )
    run.add_argument("--method", choices=get_args(Method), help="train with this method instead of the file's")
    run.add_argument(
        "--output", metavar="DIR", help="the run's folder; the default is runs/NAME, or runs/NAME_METHOD with --method"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, build the model, time steps of each mode and forecast the run; write only the data cache",
    )
    run.add_argument(
        "--for",
        dest="machine",
        metavar="DEVICE:N",
        help="with --dry-run: compute whether the run fits into the memory of N other devices, for example h100:8 or 80GB:8 "
        f"({', '.join(memory.CARDS)}); nothing is timed",
    )
    run.add_argument(
        "--write-control",
        type=Path,
        metavar="FILE",
        help="write the configuration of dense training with as many operations as this run, for the same number of ranks, "
        "and stop; `python -m sctd_ds.compare` compares the two finished runs",
    )

    start = parser.add_argument_group("where it starts")
    start.add_argument(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto (the default): continue from the newest checkpoint in the run's folder, or else start anew; must: fail "
        "if there is no checkpoint; never: fail if there is one",
    )
    start.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="continue although this key, for example pretrain.steps, differs from the checkpoint's; repeatable",
    )
    start.add_argument(
        "--start-from",
        type=Path,
        metavar="CHECKPOINT",
        help="if the run's folder has no checkpoint, start from another run's (RUN/checkpoints/step_...), also from one "
        "with other pipeline stages, ranks or ZeRO stage; exact except for dropout's random numbers",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    # Place and log
    here = place.find()
    launcher = stop.Launcher(here.launched)  # now, because it may end before training starts
    deepspeed_logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    level = logging.INFO if here.rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    elsewhere = memory.parse_machine(arguments.machine) if arguments.machine else None
    if elsewhere and not arguments.dry_run:
        raise ConfigError(f"--for {arguments.machine} computes what a run would need, and trains nothing: add --dry-run")

    # Configuration, data and folder, as far as seconds show: before ranks wait for each other, and anything is built
    world = elsewhere.devices if elsewhere else here.world
    run = job.load(arguments.deepspeed_config, arguments.set, world, arguments.method)
    options = run.pretrain
    source = arguments.data or options.data
    folder = Path(arguments.output) if arguments.output else Path("runs", run.name)
    job.check_files(source, run)
    if not arguments.write_control:
        output.check(folder)
    for note in filter(None, (here.note, *(() if elsewhere else run.notes))):
        logger.info("%s", note)

    # Ranks
    ranks.init_distributed()
    rank = dist.get_rank()
    # The first that all ranks do together: here they hear of a node that has refused its input.
    probes = ranks.on_all(lambda: training.load(options.evaluate) if options.evaluate and rank == 0 else {})
    if arguments.write_control:
        packed = job.prepare_data(source, run)
        ranks.on_first(lambda: control.write(run, job.shape_of(run, packed), source, arguments.write_control))
        return 0
    if options.deterministic:
        job.be_deterministic()

    # Checkpoint to start from
    if not arguments.dry_run:
        lock.share(folder, create=False)
    found = checkpoint.find(folder / "checkpoints", arguments.resume, tidy=not arguments.dry_run)
    origin = found or arguments.start_from

    # Data
    packed = job.prepare_data(source, run)
    if elsewhere:
        logger.info("dry run. Nothing was written.\n%s", job.forecast_elsewhere(run, packed, elsewhere))
        return 0
    settings = {**run.flat(), "data.fingerprint": packed.meta.fingerprint}
    if origin:
        allowed = tuple(arguments.allow_change)
        ranks.on_all(
            lambda: checkpoint.check(
                origin, settings, allowed, steps=options.steps, from_steps=run.from_steps, other_layout=not found
            )
        )
    loader, validation_batches = job.make_batches(run, packed, rank)

    # Model
    model = ranks.on_all(lambda: models.build_model(run, packed))
    logger.info("%s", job.describe(model, run, packed))

    # What a step costs
    shape = job.shape_of(run, packed)
    repeats = 2 if arguments.dry_run else options.probe_steps
    measured = probe.measure(model, run, loader, repeats) if repeats else None
    loader.load_state_dict({"position": 0})
    if arguments.dry_run:
        assert measured is not None
        if rank == 0:  # the others would compute the same
            logger.info("dry run: everything fits. Nothing was written.\n%s", job.forecast(run, packed, measured))
        return 0

    # Engine
    lock.share(folder)
    if options.stages > 1:
        model = Pipeline(model, stages=options.stages, length=options.seq_length)
    optimizer = models.build_optimizer(run, model)  # None: DeepSpeed builds it
    engine, *_ = sctd_ds.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=models.parameter_groups(run, model),
        lr_scheduler=schedules.of(run.transformers_schedule),
        config=run.deepspeed,
    )
    torch.manual_seed(options.seed + 1 + rank)  # ranks have the same weights, but each has dropout of its own
    if origin:
        position = checkpoint.load(engine, origin) if found else checkpoint.start(engine, origin)
        loader.load_state_dict({"position": position})
        logger.info("%s from %s", "continuing" if found else "starting", origin)

    # Train
    if rank == 0 and options.stages == 1 and engine.applied_steps == 0:
        samples.remember(engine.module, packed, folder)
    with Metrics(
        folder,
        start=engine.applied_steps,
        total=options.steps,
        every=options.log_every,
        batch=run.global_batch,
        keep=found is not None,
        monitor=take_monitor(engine, settings),
        rank=rank,
    ) as metrics:

        def save() -> None:
            metrics.flush()  # what is recorded of the checkpoint's steps must be on the disk before it
            start = time.perf_counter()
            saved = checkpoint.save(engine, folder / "checkpoints", settings, loader.position, options.keep_last)
            metrics.saved(saved, time.perf_counter() - start)

        def judge(step: int) -> None:
            values = validation.judge(engine, validation_batches, options.mlm_probability)
            if rank == 0 and probes:
                values |= training.score(engine.module, packed.tokenizer, probes, longest=options.seq_length)
            metrics.validation(step, values)
            if rank == 0 and options.stages == 1:
                read = samples.read(engine.module, packed, folder)
                metrics.show(step, "masked text", [sample.while_training() for sample in read])

        finished = train(engine, loader, run, metrics, launcher, judge, save)
    if not finished:
        logger.info("stopped after step %d, as asked; the same command continues", engine.applied_steps)
        return 143

    # Report and export
    report.finish(engine, run, packed, shape, measured, folder)
    return 0


def train(
    engine: Any,
    loader: data.Loader,
    run: RunConfig,
    metrics: Metrics,
    launcher: stop.Launcher,
    judge: Callable[[int], None],
    save: Callable[[], None],
) -> bool:
    """From the engine's step to the last, or to that of an early end; False if a signal stopped it before. The last step taken
    is saved in each case.

    judge: validates after a step, and records it.
    """
    options, kept_share = run.pretrain, report.kept_share(run)
    stop.listen(engine)
    engine.train()
    if options.trained_model and engine.applied_steps == 0:
        judge(0)
    stalled = has_stalled(metrics, options.early_stopping)

    while engine.applied_steps < options.steps and not stalled:
        # Mode
        mode, rate = engine.step_mode, engine.get_lr()[0]
        engine.stop_requested |= launcher.is_lost()

        # Forward, backward and update
        start = time.perf_counter()
        try:
            loss = engine.train_batch(loader)
        except NonFiniteLossError as error:
            if error.here:
                logger.error("rank %d, samples (epoch, row) of the last micro-batch: %s", dist.get_rank(), loader.sample_ids)
            raise
        seconds = time.perf_counter() - start
        step, applied = engine.applied_steps, engine.was_step_applied()
        last = step == options.steps

        # Record; a step that overflowed left the weights as they were and is taken again
        if applied:
            values = {
                **engine.step_parts,
                "loss": loss,
                "lr": rate,
                "grad_norm": as_float(engine.get_global_grad_norm()),
                "loss_scale": loss_scale(engine),
                "skipped_steps": engine.skipped_steps,
                "step_ms": seconds * 1000,
                "tokens_per_s": run.global_batch * options.seq_length / seconds,
                "kept_token_share": 1.0 if mode == "dense" else kept_share,
            }
            metrics.train(step, mode, values, loader.position)

        # Validate
        if last or (applied and is_due(step, options.validation_every)):
            judge(step)
            stalled = has_stalled(metrics, options.early_stopping)

        # Save
        if last or stalled or engine.stop_agreed or (applied and is_due(step, options.save_every)):
            save()

        # Stop
        if engine.stop_agreed and not last and not stalled:
            return False
    if engine.applied_steps < options.steps:
        logger.info(
            "early end after step %d: %d validations in a row have not lowered the loss (pretrain.early_stopping)",
            engine.applied_steps,
            options.early_stopping,
        )
    return True


def has_stalled(metrics: Metrics, patience: int) -> bool:
    """Whether so many validations in a row, of this run or of the one that it continues, have not lowered the loss; 0: never.

    Rank 0, which has the records, decides for all. Every rank calls.
    """
    return patience > 0 and ranks.on_first(metrics.validations_without_gain) >= patience


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0: never."""
    return every > 0 and step % every == 0


def as_float(value: Any) -> float | None:
    return None if value is None else float(value)


def loss_scale(engine: Any) -> float | None:
    return float(engine._get_optimizer_loss_scale()) if engine.fp16_enabled() else None


def run_and_report(argv: list[str] | None = None) -> int:
    """`main`, with an error that is meant for the user as one line instead of a traceback. Returns the exit status."""
    problem: Exception
    try:
        return main(argv)
    except (ConfigError, data.DataError, checkpoint.CheckpointError, output.OutputError, EvalError) as error:
        problem, status = error, 2
    except TrainingError as error:
        problem, status = error, 3
    # What all ranks raise is printed by the first; what one rank alone raises, by that rank. Before ranks know of each other,
    # the first of each machine prints: the others see the same files.
    together = dist.is_initialized()
    rank = dist.get_rank() if together else int(os.environ.get("LOCAL_RANK", "0"))
    if rank == 0 or (together and not getattr(problem, "shared", False)):
        print(f"pretrain: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr)
    if not together:
        ranks.tell(problem)
    return status
