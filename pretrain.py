"""Pretrain a BERT with token dropping and semantic-consistent learning.

    deepspeed pretrain.py --deepspeed_config ds_configs/tiny.json

One JSON file describes the run: DeepSpeed's keys, a "sctd" block (the method) and a "pretrain" block (model, data, length).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
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
from sctd_ds.engine import checkpoint, ranks
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.engine.ranks import init_distributed
from sctd_ds.engine.step import NonFiniteLossError, TrainingError
from sctd_ds.method.plan import kept_tokens
from sctd_ds.run import job, models, probe, report
from sctd_ds.run.metrics import Metrics
from sctd_ds.run.settings import RunConfig
from sctd_ds.run.validation import validate

logger = logging.getLogger("pretrain")


EPILOG = """\
Every key of the file can be changed: --set sctd.interval=20 --set pretrain.steps=1000. A run that is stopped (Ctrl-C,
SIGTERM, a lost machine) continues exactly when the same command is started again. Exit status: 0 finished, 2 bad input,
3 training cannot go on, 143 stopped by a signal after a checkpoint."""

RESUME = (
    "auto: continue from the newest checkpoint in the run's folder, else start; must: refuse to start anew; never: refuse to "
    "continue"
)
START_FROM = (
    "with nothing to continue: start from another run's checkpoint (RUN/checkpoints/step_...), also one of other pipeline "
    "stages, ranks or ZeRO stage; exact but for dropout's draws"
)
DRY_RUN = "check everything, build the model, time two steps of each kind, forecast the run; write nothing but the data cache"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("deepspeed pretrain.py", description=__doc__, formatter_class=raw, epilog=EPILOG)
    add, repeat = parser.add_argument, {"action": "append", "default": []}
    add("--deepspeed_config", required=True, metavar="FILE", help="the run's JSON file")
    add("--data", nargs="+", metavar="SOURCE", help="built data folder, or raw text: replaces pretrain.data")
    add("--output", metavar="DIR", help="folder of the run; otherwise runs/NAME, or runs/NAME_METHOD with --method")
    add("--method", choices=get_args(Method), help="train with this method, whichever the file names")
    add("--resume", choices=("auto", "must", "never"), default="auto", help=RESUME)
    change = "change one key of the file, dotted: sctd.interval=20; repeatable"
    add("--set", **repeat, metavar="KEY=VALUE", dest="overrides", help=change)
    allow = "on resume, accept another value of this key, for example pretrain.steps; repeatable"
    add("--allow-change", **repeat, metavar="KEY", help=allow)
    add("--start-from", metavar="CHECKPOINT", type=Path, help=START_FROM)
    add("--dry-run", action="store_true", help=DRY_RUN)
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    deepspeed_logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run = ranks.on_all(lambda: job.load(arguments.deepspeed_config, arguments.overrides, world, arguments.method))
    for note in run.notes:
        logger.info("%s", note)
    options = run.pretrain
    if options.deterministic:
        job.be_deterministic()
    folder = Path(arguments.output) if arguments.output else Path("runs", run.name)
    found = checkpoint.find(folder / "checkpoints", arguments.resume, tidy=not arguments.dry_run)
    origin = found or arguments.start_from

    packed = job.prepare_data(arguments.data or options.data, run)
    recorded = {**run.flat(), "data.fingerprint": packed.meta.fingerprint}
    if origin:
        allowed = tuple(arguments.allow_change)
        ranks.on_all(lambda: checkpoint.check(origin, recorded, allowed, steps=options.steps, other_layout=not found))
    loader, validation = job.make_batches(run, packed, rank)
    model = ranks.on_all(lambda: models.build_model(run, packed))
    shape = job.shape_of(model, run, packed)
    logger.info("%s", job.describe(model, run, packed))

    repeats = 2 if arguments.dry_run else options.probe_steps
    measured = probe.measure(model, run, loader, repeats) if repeats else None
    loader.load_state_dict({"position": 0})
    if arguments.dry_run:
        logger.info("dry run: everything fits. Nothing was written.\n%s", job.forecast(run, shape, measured, folder))
        return 0

    if options.stages > 1:
        model = Pipeline(model, stages=options.stages, length=options.seq_length)
    optimizer = models.build_optimizer(run, model)
    engine, *_ = sctd_ds.initialize(model=model, optimizer=optimizer, model_parameters=model.parameters(), config=run.deepspeed)
    # Ranks start from the same weights and go on with dropout of their own.
    torch.manual_seed(options.seed + 1 + rank)
    if origin:
        position = checkpoint.load(engine, origin) if found else checkpoint.start(engine, origin)
        loader.load_state_dict({"position": position})
        logger.info("%s from %s", "continuing" if found else "starting", origin)

    progress = {"start": engine.applied_steps, "total": options.steps, "every": options.log_every, "keep": bool(found)}
    metrics = Metrics(folder, **progress, monitor=engine.monitor, rank=rank)

    def save() -> None:
        metrics.flush()  # a checkpoint stands for its steps: what is known of them must last as long
        checkpoint.save(engine, folder / "checkpoints", recorded, loader.position, options.keep_last)

    if train(engine, loader, run, metrics, evaluate=lambda: validate(engine, validation()), save=save):
        logger.info("stopped by a signal after step %d; the same command continues", engine.applied_steps)
        return 143
    packed.tokenizer.model_max_length = max(packed.tokenizer.model_max_length, options.seq_length)
    result = report.build(run, shape, measured, folder) if rank == 0 else {}
    text = report.card(result, run, vars(packed.meta)) if rank == 0 else None
    sctd_ds.export(engine, folder / "model", packed.tokenizer, text)
    if rank == 0:
        report.write(result, folder)
        print(report.text(result, folder))
    return 0


def train(
    engine: Any,
    loader: data.Loader,
    run: RunConfig,
    metrics: Metrics,
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[], None],
) -> bool:
    """From the engine's step to the last; returns whether a signal stopped it early. Saves before it returns."""
    options = run.pretrain
    listen(engine)
    parent = os.getppid()
    kept = 1.0 if run.sctd.method == "dense" else kept_tokens(options.seq_length, run.sctd.drop_ratio) / options.seq_length
    engine.train()
    try:
        if options.trained_model and engine.applied_steps == 0:
            metrics.validation(0, evaluate(), loader.position)
        while engine.applied_steps < options.steps:
            kind, start = engine.step_mode, time.perf_counter()
            rate = engine.get_lr()[0]
            # The launcher may be killed without a word to its children.
            engine.stop_requested |= os.getppid() != parent
            loss = engine.train_batch(loader)
            seconds = time.perf_counter() - start
            step, applied = engine.applied_steps, engine.was_step_applied()
            if applied:
                record = {
                    "step": step,
                    "kind": kind,
                    **engine.step_parts,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": as_float(engine.get_global_grad_norm()),
                    "loss_scale": loss_scale(engine),
                    "skipped_steps": engine.skipped_steps,
                    "step_ms": seconds * 1000,
                    "tokens_per_s": run.global_batch * options.seq_length / seconds,
                    "kept_token_share": 1.0 if kind == "dense" else kept,
                }
                metrics.train(record, loader.position)
            last = step == options.steps
            if last or (options.validation_every and step % options.validation_every == 0 and applied):
                metrics.validation(step, evaluate(), loader.position)
            if last or engine.stop_agreed or (options.save_every and step % options.save_every == 0 and applied):
                save()
            if engine.stop_agreed and not last:
                return True
    except NonFiniteLossError as error:
        if error.here:
            where = "rank %d, samples (epoch, row) of the last micro-batch: %s"
            logger.error(where, dist.get_rank(), loader.sample_ids)
        raise
    finally:
        metrics.close()
    return False


def listen(engine: Any) -> None:
    """SIGTERM and Ctrl-C ask for a checkpoint and a stop after the step; a second Ctrl-C stops at once."""

    def request(number: int, frame: Any) -> None:
        engine.stop_requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)


def as_float(value: Any) -> float | None:
    return None if value is None else float(value)


def loss_scale(engine: Any) -> float | None:
    return float(engine._get_optimizer_loss_scale()) if engine.fp16_enabled() else None


def run_and_report(argv: list[str] | None = None) -> int:
    """main, with errors that are meant for the user as one line on rank 0."""
    try:
        return main(argv)
    except (ConfigError, data.DataError, checkpoint.CheckpointError) as error:
        problem, status = error, 2
    except TrainingError as error:
        problem, status = error, 3
    rank = dist.get_rank() if dist.is_initialized() else 0
    # What all ranks know is said once; what one rank alone knows, there.
    if rank == 0 or not getattr(problem, "shared", False):
        print(f"pretrain.py: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run_and_report())
