"""One JSON file describes one run: read, overridden, checked and resolved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from sctd_ds.config import BERT_SIZES, ConfigError, PretrainConfig, ScTDConfig, replicas
from sctd_ds.deepspeed_json import check_deepspeed, check_layout, check_top_level, json_block, leaves, read_json
from sctd_ds.method.schedule import dropping_phase

# "auto" values that this project resolves itself (see `load`); anywhere else "auto" is refused.
_RESOLVED_AUTO = {
    ("gradient_accumulation_steps",),
    ("scheduler", "params", "total_num_steps"),
    ("scheduler", "params", "warmup_max_lr"),
    ("sctd", "keep_token_ids"),
    ("pretrain", "compile"),
    ("pretrain", "precision"),
}


@dataclass(frozen=True)
class RunConfig:
    """A validated run: what DeepSpeed gets, the method, the run, and what was resolved on the way (`notes`)."""

    name: str
    deepspeed: dict[str, Any]
    sctd: ScTDConfig
    pretrain: PretrainConfig
    micro_batch: int
    accumulation: int
    world_size: int
    """Data-parallel ranks; with pipeline stages, replicas of the pipeline."""
    notes: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step, over all ranks and micro-batches."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.world_size * self.pretrain.stages

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted key: what a checkpoint stores and a resumed run is compared with."""
        blocks = {
            **self.deepspeed,
            "sctd": self.sctd.model_dump(exclude={"total_steps"}),
            "pretrain": self.pretrain.model_dump(),
        }
        return {".".join(path): value for path, value in leaves(blocks)}


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), world_size: int = 1) -> RunConfig:
    """Read, override, check and resolve a run's configuration.

    source: a JSON file, or its content as a mapping. overrides: "dotted.key=value", value in JSON or a bare word.
    world_size: processes of the run. Raises ConfigError.
    """
    raw, name = read_json(source)
    for item in overrides:
        _apply_override(raw, item)
    check_top_level(raw, extra=("sctd", "pretrain"))

    sctd = ScTDConfig(**json_block(raw, "sctd"))
    pretrain = PretrainConfig(**json_block(raw, "pretrain"))
    sctd = _count_phases(sctd, pretrain)
    if pretrain.tokenizer and pretrain.trained_model:
        raise ConfigError(
            f'pretrain.tokenizer="{pretrain.tokenizer}", but the trained model {pretrain.trained_model} brings its own: '
            "remove the key (into a model folder without one, save the tokenizer)"
        )
    deepspeed = {key: value for key, value in raw.items() if key not in ("sctd", "pretrain")}
    check_deepspeed(deepspeed)
    for path, value in leaves(raw):
        if value == "auto" and path not in _RESOLVED_AUTO:
            raise ConfigError(f'{".".join(path)} is "auto", which nothing here resolves: write the value itself')
    world_size = _replicas(deepspeed, pretrain, world_size)
    micro, accumulation = _resolve_batch(deepspeed, world_size)
    _resolve_schedule(deepspeed, pretrain)
    notes = _resolve_precision(deepspeed, pretrain)
    return RunConfig(name, deepspeed, sctd, pretrain, micro, accumulation, world_size, notes)


def _count_phases(sctd: ScTDConfig, pretrain: PretrainConfig) -> ScTDConfig:
    """The method, told the length of the run. Raises ConfigError for dense phases that leave no step to drop tokens in."""
    if sctd.total_steps not in (None, pretrain.steps):
        raise ConfigError(f"sctd.total_steps={sctd.total_steps}, but pretrain.steps={pretrain.steps}: remove sctd.total_steps")
    sctd = sctd.model_copy(update={"total_steps": pretrain.steps})
    dropping_phase(sctd)
    return sctd


def _replicas(config: Mapping[str, Any], pretrain: PretrainConfig, ranks: int) -> int:
    """How many pipelines the ranks form. Raises ConfigError for settings that a pipeline cannot have."""
    stages = pretrain.stages
    if stages == 1:
        return ranks
    check_layout(config.get("zero_optimization", {}).get("stage", 0), pipeline=True)
    if config.get("pipeline", {}).get("activation_checkpoint_interval"):
        raise ConfigError(
            "pipeline.activation_checkpoint_interval cannot be used with token dropping: sctd.recompute_align saves memory"
        )
    return replicas(ranks, stages)


def _resolve_batch(config: dict[str, Any], world_size: int) -> tuple[int, int]:
    """Fill in the missing one of the three batch keys; returns (micro batch, accumulation steps)."""
    total, micro, steps = (
        config.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    steps = None if steps == "auto" else steps
    for key, value in (("train_batch_size", total), ("train_micro_batch_size_per_gpu", micro),
                       ("gradient_accumulation_steps", steps)):  # fmt: skip
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key}={value!r}: expected a whole number of at least 1")
    if total is None and micro is None:
        raise ConfigError("set train_batch_size (rows per step over all ranks) or train_micro_batch_size_per_gpu")
    if micro is None:
        assert total is not None
        micro = total // (world_size * (steps or 1)) or 1
    if steps is None:
        steps = 1 if total is None else total // (micro * world_size)
    if total is None:
        total = micro * steps * world_size
    if micro * steps * world_size != total:
        raise ConfigError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} x gradient_accumulation_steps={steps} "
            f"x {world_size} ranks: choose a micro batch and a number of ranks whose product divides {total}"
        )
    config.update(train_batch_size=total, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps)
    return micro, steps


def _resolve_schedule(config: dict[str, Any], pretrain: PretrainConfig) -> None:
    params = config.get("scheduler", {}).get("params", {})
    if params.get("total_num_steps") == "auto":
        params["total_num_steps"] = pretrain.steps
    if params.get("warmup_max_lr") == "auto":
        rate = config.get("optimizer", {}).get("params", {}).get("lr")
        if rate is None:
            raise ConfigError('scheduler.params.warmup_max_lr is "auto", but optimizer.params.lr is not set')
        params["warmup_max_lr"] = rate
    warmup, total = params.get("warmup_num_steps"), params.get("total_num_steps")
    if isinstance(warmup, int) and isinstance(total, int) and warmup >= total:
        raise ConfigError(f"scheduler.params.warmup_num_steps={warmup} must be below total_num_steps={total}")


def _resolve_precision(config: dict[str, Any], pretrain: PretrainConfig) -> tuple[str, ...]:
    """Replace fp16 by bf16 where the device has no fp16; returns what to tell the user."""
    from deepspeed.accelerator import get_accelerator

    fp16 = config.get("fp16", {})
    if not fp16.get("enabled") or get_accelerator().is_fp16_supported():
        return ()
    device = get_accelerator().device_name()
    if pretrain.precision == "strict":
        raise ConfigError(
            f'fp16.enabled is true, but the device "{device}" has no fp16: use bf16, or "pretrain": {{"precision": "auto"}}'
        )
    config.pop("fp16")
    config["bf16"] = {"enabled": True}
    return (f'The device "{device}" has no fp16: training in bf16 instead (pretrain.precision="strict" refuses).',)


def _apply_override(raw: dict[str, Any], item: str) -> None:
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise ConfigError(f'--set "{item}": expected dotted.key=value, for example sctd.interval=20')
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f'--set "{item}": the value must be finite')
    *blocks, key = path.split(".")
    for part in blocks:
        inner = raw.setdefault(part, {})
        if part == "model" and isinstance(inner, str) and inner in BERT_SIZES:  # a preset, with one of its sizes changed
            inner = raw[part] = dict(BERT_SIZES[inner])
        if part == "model" and isinstance(inner, str):
            raise ConfigError(f'--set "{item}": pretrain.model="{inner}" is a trained model, whose sizes cannot be changed')
        if not isinstance(inner, dict):
            raise ConfigError(f'--set "{item}": "{part}" is not a block')
        raw = inner
    raw[key] = value
