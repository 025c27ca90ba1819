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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import logger as deepspeed_logger

import sctd_ds
from sctd_ds import checkpoint, config, data, job, probe, ranks, report
from sctd_ds.engine import NonFiniteLossError, TrainingError, init_distributed
from sctd_ds.metrics import Metrics
from sctd_ds.pipeline import Pipeline
from sctd_ds.schedule import kept_tokens
from sctd_ds.validation import validate

logger = logging.getLogger("pretrain")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key of the file can be changed: --set sctd.interval=20 --set pretrain.steps=1000. A run that is stopped "
        "(Ctrl-C, SIGTERM, a lost machine) continues exactly when the same command is started again. Exit status: 0 finished, "
        "2 bad input, 3 training cannot go on, 143 stopped by a signal after a checkpoint.",
    )  # fmt: skip
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the run's JSON file")
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="built data folder, or raw text: replaces pretrain.data")
    parser.add_argument("--output", metavar="DIR", help="folder of the run: replaces pretrain.output (runs/NAME)")
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto",
                        help="auto: continue from the newest checkpoint in the run's folder, else start; must: refuse to "
                        "start anew; never: refuse to continue")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change one key of the file, dotted: sctd.interval=20; repeatable")  # fmt: skip
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                        help="on resume, accept another value of this key, for example pretrain.steps; repeatable")  # fmt: skip
    parser.add_argument("--start-from", metavar="CHECKPOINT", type=Path,
                        help="with nothing to continue: start from another run's checkpoint (RUN/checkpoints/step_...), also "
                        "one of other pipeline stages, ranks or ZeRO stage; exact but for dropout's draws")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, build the model, time two steps of "
                        "each kind, forecast the run; write nothing but the data cache")  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    deepspeed_logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    run = ranks.on_all(lambda: config.load(arguments.deepspeed_config, arguments.overrides, world))
    for note in run.notes:
        logger.info("%s", note)
    if run.pretrain.deterministic:
        job.be_deterministic()
    folder = Path(arguments.output or run.pretrain.output.format(name=run.name))
    found = checkpoint.find(folder / "checkpoints", arguments.resume, tidy=not arguments.dry_run)
    origin = found or arguments.start_from

    packed = job.prepare_data(arguments.data or run.pretrain.data, run)
    settings = {**run.flat(), "data.fingerprint": packed.meta.fingerprint}
    if origin:
        ranks.on_all(lambda: checkpoint.check(origin, settings, tuple(arguments.allow_change), steps=run.pretrain.steps,
                                              other_layout=not found))  # fmt: skip
    masker = data.Masker(packed.tokenizer, run.pretrain.seed, run.pretrain.mlm_probability)
    # DeepSpeed numbers ranks stage by stage; all stages of a pipeline read the same rows.
    loader = data.Loader(packed.train, masker, micro_batch=run.micro_batch, accumulation=run.accumulation,
                         rank=rank % run.world_size, world=run.world_size, seed=run.pretrain.seed,
                         num_workers=run.pretrain.num_workers)  # fmt: skip
    model = ranks.on_all(lambda: job.build_model(run, packed))
    shape = job.shape_of(model, run, packed)
    logger.info("%s", job.describe(model, run, packed))

    repeats = 2 if arguments.dry_run else run.pretrain.probe_steps
    measured = probe.measure(model, run, loader, repeats) if repeats else None
    loader.load_state_dict({"position": 0})
    if arguments.dry_run:
        logger.info("dry run: everything fits. Nothing was written.\n%s", job.forecast(run, shape, measured, folder))
        return 0

    if run.pretrain.stages > 1:
        model = Pipeline(model, stages=run.pretrain.stages, length=run.pretrain.seq_length)
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=run.deepspeed)
    # Ranks start from the same weights and go on with dropout of their own.
    torch.manual_seed(run.pretrain.seed + 1 + rank)
    if origin:
        position = checkpoint.load(engine, origin) if found else checkpoint.start(engine, origin)
        loader.load_state_dict({"position": position})
        logger.info("%s from %s", "continuing" if found else "starting", origin)

    metrics = Metrics(folder, start=engine.applied_steps, total=run.pretrain.steps, every=run.pretrain.log_every,
                      keep=bool(found), monitor=engine.monitor, rank=rank)  # fmt: skip
    stopped = train(engine, loader, run, packed, masker, metrics, folder, settings)
    if stopped:
        logger.info("stopped by a signal after step %d; the same command continues", engine.applied_steps)
        return 143
    packed.tokenizer.model_max_length = max(packed.tokenizer.model_max_length, run.pretrain.seq_length)
    result = report.build(run, shape, measured, folder) if rank == 0 else {}
    text = report.card(result, run, vars(packed.meta)) if rank == 0 else None
    sctd_ds.export(engine, folder / "model", packed.tokenizer, text)
    if rank == 0:
        report.write(result, folder)
        print(report.text(result, folder))
    return 0


def train(engine: Any, loader: data.Loader, run: config.RunConfig, packed: data.PackedData, masker: data.Masker,
          metrics: Metrics, folder: Path, settings: dict[str, Any]) -> bool:  # fmt: skip
    """From the engine's step to the last; returns whether a signal stopped it early. Saves before it returns."""
    options, rank = run.pretrain, dist.get_rank()

    def evaluate() -> dict[str, float]:
        batches = data.validation_batches(packed.validation, masker, batch_size=run.micro_batch, rank=rank % run.world_size,
                                          world=run.world_size,
                                          max_batches=-(-options.validation_rows // run.micro_batch))  # fmt: skip
        return validate(engine, batches)

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
            step, samples = engine.applied_steps, loader.position
            if engine.was_step_applied():
                metrics.train({
                    "step": step, "kind": kind, **engine.step_parts, "loss": loss, "lr": rate,
                    "grad_norm": as_float(engine.get_global_grad_norm()), "loss_scale": loss_scale(engine),
                    "skipped_steps": engine.skipped_steps, "step_ms": seconds * 1000,
                    "tokens_per_s": run.global_batch * options.seq_length / seconds,
                    "kept_token_share": 1.0 if kind == "dense" else kept,
                }, samples)  # fmt: skip
            last = step == options.steps
            if last or (options.validation_every and step % options.validation_every == 0 and engine.was_step_applied()):
                metrics.validation(step, evaluate(), samples)
            if last or engine.stop_agreed or (options.save_every and step % options.save_every == 0):
                metrics.flush()  # a checkpoint stands for its steps: what is known of them must last as long
                checkpoint.save(engine, folder / "checkpoints", settings, samples, options.keep_last)
            if engine.stop_agreed and not last:
                return True
    except NonFiniteLossError as error:
        if error.here:
            logger.error("rank %d, samples (epoch, row) of the last micro-batch: %s", rank, loader.sample_ids)
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
    except (config.ConfigError, data.DataError, checkpoint.CheckpointError) as error:
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
