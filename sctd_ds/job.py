"""The pieces of a pretraining job that pretrain.py puts together: its data, its model, its forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator

from sctd_ds import apex, config, data, report
from sctd_ds.config import RunConfig
from sctd_ds.encoder import convert, state_of
from sctd_ds.probe import Probe
from sctd_ds.schedule import Shape, mean_cost


def prepare_data(spec: str | list[str], run: RunConfig) -> data.PackedData:
    """Built data, or raw text built once into data/cache: rank 0 works, the others wait. Raises DataError on every rank."""
    options = run.pretrain
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = data.prepare(
                spec,
                Path("data") / "cache",
                tokenizer=options.tokenizer,
                vocab_size=options.vocab_size,
                seq_length=options.seq_length,
                seed=options.seed,
            )
        except data.DataError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    path, problem = answer
    if problem:
        raise data.DataError(problem)
    packed = data.load(path, seq_length=options.seq_length)
    if len(packed.train) < run.global_batch:
        raise data.DataError(
            f"{path}: {len(packed.train)} training rows are fewer than one batch of {run.global_batch}: "
            "add text, or lower train_batch_size or pretrain.seq_length"
        )
    return packed


def build_model(run: RunConfig, packed: data.PackedData) -> transformers.BertForMaskedLM:
    """The run's model in fp32, initialised from its seed, converted, and compiled where the run asks for it."""
    tokenizer, multiple = packed.tokenizer, run.pretrain.pad_vocab_to
    transformers.set_seed(run.pretrain.seed)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            **config.model_arguments(run.pretrain),
            vocab_size=-(-len(tokenizer) // multiple) * multiple,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if run.pretrain.layer_norm == "apex":
        apex.fuse_layer_norms(model)
    settings: dict[str, Any] = {"labels_per_row": labels_per_row(run, packed)}
    if run.sctd.keep_token_ids == "auto":
        settings["keep_token_ids"] = [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "cls", "sep", "mask")]
    convert(model, run.sctd.model_copy(update=settings))
    wanted = run.pretrain.compile
    if wanted is True or (wanted == "auto" and get_accelerator().device_name() == "cuda"):
        state_of(model).encoder.compile()
    return model


def labels_per_row(run: RunConfig, packed: data.PackedData) -> int:
    """Labelled tokens of a full row: fixed, so that shapes are."""
    return data.Masker(packed.tokenizer, 0, run.pretrain.mlm_probability).labels_per_row(run.pretrain.seq_length)


def shape_of(model: transformers.BertForMaskedLM, run: RunConfig, packed: data.PackedData) -> Shape:
    """The sizes that decide a step's cost."""
    sizes = model.config
    return Shape(
        layers=sizes.num_hidden_layers,
        hidden=sizes.hidden_size,
        intermediate=sizes.intermediate_size,
        vocabulary=sizes.vocab_size,
        length=run.pretrain.seq_length,
        labels=labels_per_row(run, packed),
    )


def describe(model: transformers.BertForMaskedLM, run: RunConfig, packed: data.PackedData) -> str:
    """The line a run starts with."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    stages = run.pretrain.stages
    who = "ranks" if stages == 1 else f"pipelines of {stages} stages"
    return (
        f"{run.name}: {millions:.1f}M parameters, {len(packed.train):,} rows of {run.pretrain.seq_length} tokens to train on, "
        f"{len(packed.validation):,} to validate; a step is {run.world_size} {who} x {run.micro_batch} rows x "
        f"{run.accumulation} micro-batches"
    )


def forecast(run: RunConfig, shape: Shape, measured: Probe, folder: Path) -> str:
    """What a dry run tells: time by kind of step, saving, the whole run, memory."""
    result = report.build(run, shape, measured, folder)
    hours = mean_cost(run.sctd, measured.step_ms) * run.pretrain.steps / 3.6e6
    lines = report.saving_text(result)
    lines.append(f"  whole run        {run.pretrain.steps:,} steps, about {hours:,.1f} hours on this device")
    for kind, size in measured.peak_bytes.items():
        lines.append(f"  peak memory      {kind}: {size / 2**30:.1f} GiB")
    return "\n".join(lines)
