"""Everything that can be wrong with a DeepSpeed configuration, as one list of findings.

Loading a run and `sctd_ds.initialize` raise the first finding that refuses (`check`). The doctor prints them all, and writes
what `repair` makes. Each fact is one function below, which yields what it finds in the raw configuration.

DeepSpeed itself skips an unknown top-level key without a word; here an unknown key is an error wherever it stands.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from sctd_ds.config import (
    REMOVED_KEYS,
    Block,
    ConfigError,
    PretrainConfig,
    ScTDConfig,
    counted,
    did_you_mean,
    leaves,
    problems,
    short,
)
from sctd_ds.deepspeed_schema import (
    BLOCKS,
    DEEPSPEED_KEYS,
    PHASES,
    SCHEDULES,
    TORCH_OPTIMIZERS,
    TRANSFORMERS_SCHEDULES,
    VALUES,
    Model,
    inner,
    optimizer_class,
    optimizer_parameters,
    schedule_parameters,
)

Repair = Callable[[Block], object]
"""Puts a configuration right, in place."""
Kind = Literal["refused", "ignored", "conflict", "warning", "deprecated", "missing"]
"""refused: DeepSpeed or sctd_ds stops with an error. ignored: nothing reads it. conflict: token dropping cannot work with it.
warning: it can, but is hardly meant. deprecated: still read, in an older form. missing: has to be added."""
REFUSING: tuple[Kind, ...] = ("refused", "ignored", "conflict")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a configuration."""

    kind: Kind
    key: str
    """Dotted."""
    why: str
    """What is wrong; names key and value."""
    remedy: str
    repair: Repair | None = None
    """The remedy as code; None: somebody has to decide."""

    def __str__(self) -> str:
        return " ".join(f"{self.why}; {self.remedy}".split())  # a value may hold line breaks


def check(raw: Block, pipeline: bool | None = None) -> None:
    """ConfigError with the first finding that refuses. Arguments as for `diagnose`."""
    refusing = [finding for finding in diagnose(raw, pipeline) if finding.kind in REFUSING]
    if len(refusing) > 1:
        raise ConfigError(f"{refusing[0]} (and {len(refusing) - 1} more: `python -m sctd_ds.doctor FILE` lists them)")
    if refusing:
        raise ConfigError(str(refusing[0]))


def diagnose(raw: Block, pipeline: bool | None = None) -> list[Finding]:
    """All that stands between this configuration and a run with token dropping, in the order of the file's keys.

    raw: as in the file; with a "pretrain" block it is a file of pretrain.py. pipeline: whether the model is a pipeline; None:
    as the file says.
    """
    if pipeline is None:
        pipeline = _wants_pipeline(raw)
    found = [
        *_removed(raw),
        *_unknown_keys(raw, "", DEEPSPEED_KEYS | {"sctd", "pretrain"}),
        *_no_objects(raw),
        *_values(raw, "", VALUES),
        *_blocks(raw),
        *_optimizer(raw),
        *_scheduler(raw),
        *_monitors(raw),
        *_two_precisions(raw),
        *_older_forms(raw),
        *_layout(zero_stage(raw), raw.get("sequence_parallel_size", 1), pipeline),
        *_pipeline_block(raw, pipeline),
        *_sums_of_a_pipeline(raw, pipeline),
        *_random_ltd(raw),
        *_host_stops(raw),
        *_unresolved(raw),
        *_no_method(raw),
    ]
    order = {key: place for place, key in enumerate(raw)}
    return sorted(found, key=lambda finding: order.get(finding.key.partition(".")[0], len(order)))


def repair(raw: Block) -> tuple[Block, list[Finding]]:
    """A repaired copy, and what is still wrong with it and needs a decision."""
    config = copy.deepcopy(raw)
    # A repair can uncover another finding (a renamed key, whose block is then looked into), so until nothing changes.
    while True:
        before, found = copy.deepcopy(config), diagnose(config)
        for finding in found:
            if finding.repair is not None:
                finding.repair(config)
        if config == before:
            return config, found


def check_layout(zero_stage: int, sequence_parallel_size: int = 1, pipeline: bool = False) -> None:
    """ConfigError for a parallel layout that token dropping cannot use."""
    for finding in _layout(zero_stage, sequence_parallel_size, pipeline):
        raise ConfigError(str(finding))


def replicas(ranks: int, stages: int) -> int:
    """How many pipelines of `stages` stages the ranks form. Raises ConfigError where some are left over."""
    if ranks % stages:
        raise ConfigError(
            f"{counted(ranks, 'rank', 'ranks')} cannot form pipelines of {stages} stages: start a multiple of {stages} ranks "
            "(--num_gpus)"
        )
    return ranks // stages


def zero_stage(config: Block) -> int:
    """The ZeRO stage of a configuration, also where it is written as true or false."""
    value = config.get("zero_optimization")
    return int(value) if isinstance(value, bool) else _block(config, "zero_optimization").get("stage", 0)


# What DeepSpeed knows

_REMOVED_FROM_DEEPSPEED = [
    *getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ()),
    *(f"zero_optimization.{key}" for key in getattr(deepspeed_config, "_REMOVED_ZERO_CONFIG_KEYS", ())),
]

# Repairs


def _removing(path: str) -> Repair:
    *blocks, key = path.split(".")
    return lambda config: _block(config, *blocks).pop(key, None)


def _setting(key: str, value: object) -> Repair:
    return lambda config: config.update({key: value})


def _renaming(path: str, name: str) -> Repair:
    *blocks, old = path.split(".")

    def rename(config: Block) -> None:
        block = _block(config, *blocks)
        renamed = {name if key == old else key: value for key, value in block.items()}  # in its old place
        block.clear()
        block.update(renamed)

    return rename


def _block(config: Block, *path: str) -> Block:
    """The block at `path` itself; an empty one where there is none."""
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, dict) else {}
    return config


# Facts: keys


def _removed(raw: Block) -> Iterator[Finding]:
    """Keys that DeepSpeed, or this project, had once."""
    for path in _REMOVED_FROM_DEEPSPEED:
        if _has(raw, path):
            remedy, change = _INSTEAD.get(path, "remove it"), _REPLACING.get(path, _removing(path))
            yield Finding("refused", path, f"{path} has been removed from DeepSpeed", remedy, change)
    for path, removed in REMOVED_KEYS.items():
        if _has(raw, path):
            yield Finding("refused", path, f"{path} was removed: {removed.why}", removed.remedy, _removing(path))


_INSTEAD = {
    "sparse_attention": "remove it; attention is dense, and token dropping is what saves time now",
    "progressive_layer_drop": "remove it, and the recipe's --progressive_layer_drop; token dropping takes its place",
    "amp": 'remove it; "fp16": {"enabled": true} is the counterpart (apex.amp is gone from apex, too)',
    "curriculum_learning": "remove it; data_efficiency.data_sampling.curriculum_learning is its successor",
    "elasticity": "remove it and set train_batch_size (written: elasticity.max_train_batch_size)",
}


def _amp_to_fp16(config: Block) -> None:
    enabled = _block(config, "amp").get("enabled")
    del config["amp"]
    if enabled and not {"fp16", "bf16"} & config.keys():
        config["fp16"] = {"enabled": True}


def _elasticity_to_batch(config: Block) -> None:
    block = _block(config, "elasticity")
    del config["elasticity"]
    if block.get("enabled") and "max_train_batch_size" in block:
        config.setdefault("train_batch_size", block["max_train_batch_size"])


_REPLACING: dict[str, Repair] = {"amp": _amp_to_fp16, "elasticity": _elasticity_to_batch}


def _has(raw: Block, path: str) -> bool:
    *blocks, key = path.split(".")
    return key in _block(raw, *blocks)


def _unknown_keys(raw: Block, where: str, known: Iterable[str]) -> Iterator[Finding]:
    """Keys of the block at `where` ("": top level) that are neither in `known` nor among the removed ones."""
    block, known = _block(raw, *where.split(".")) if where else raw, set(known)
    for key in block:
        path = f"{where}.{key}" if where else key
        if key in known or path in _REMOVED_FROM_DEEPSPEED or path in REMOVED_KEYS:
            continue
        kind: Kind = "refused" if where else "ignored"
        why = f'unknown key "{key}"' + (f" in {where}" if where else ", which DeepSpeed would ignore")
        near = difflib.get_close_matches(key, sorted(known - block.keys()), n=1, cutoff=0.8)
        hint = did_you_mean(key, known)
        if near:
            yield Finding(kind, path, why, f'did you mean "{near[0]}"?', _renaming(path, near[0]))
        elif hint.startswith("known"):
            yield Finding(kind, path, why, f"remove it ({hint})", _removing(path))
        else:  # too far away to be renamed without asking
            yield Finding(kind, path, why, f"{hint} Otherwise remove it")


def _no_objects(raw: Block) -> Iterator[Finding]:
    """Blocks that hold a bare value."""
    for path in (*BLOCKS, "optimizer", "scheduler", "optimizer.params", "scheduler.params"):
        *outer, name = path.split(".")
        value = _block(raw, *outer).get(name, {})
        older_form = name == "zero_optimization" and isinstance(value, bool)
        if not isinstance(value, dict) and not older_form:
            yield Finding("refused", path, f'"{path}" must be a JSON object, found {short(value)}', "write {...}")


def _blocks(raw: Block) -> Iterator[Finding]:
    """Keys and values of the blocks."""
    for name, model in BLOCKS.items():
        if isinstance(raw.get(name), dict):
            yield from _unknown_inside(raw, name, model)
            yield from _values(raw[name], name, model)


def _unknown_inside(raw: Block, where: str, model: Model) -> Iterator[Finding]:
    """Unknown keys of a block, and of the blocks inside of it."""
    yield from _unknown_keys(raw, where, _names(model))
    for key, value in _block(raw, *where.split(".")).items():
        deeper = inner(model, key)
        if deeper is not None and isinstance(value, dict):
            yield from _unknown_inside(raw, f"{where}.{key}", deeper)


def _names(model: Model) -> set[str]:
    return {alias for key, field in model.model_fields.items() for alias in (key, field.alias) if alias}


def _known(block: Block, model: Model) -> Block:
    """A block without its unknown keys and "auto" values, of which other findings tell."""
    kept = {key: value for key, value in block.items() if key in _names(model)}
    if model not in (ScTDConfig, PretrainConfig):
        kept = {key: value for key, value in kept.items() if value != "auto"}
    blocks = {key: inner(model, key) for key, value in kept.items() if isinstance(value, dict)}
    return {**kept, **{key: _known(kept[key], deeper) for key, deeper in blocks.items() if deeper is not None}}


def _values(block: Block, where: str, model: Model) -> Iterator[Finding]:
    """Values of a block that its model refuses."""
    known = _known(block, model)
    for key, problem in problems(known, where, model).items():
        if key.rpartition(".")[2] not in block.keys() - known:  # what is there as "auto" is not missing
            yield Finding("refused", key, problem, "correct the value")


# Facts: optimizer and learning rate


# The 1-bit optimizers are gone; these are the optimizers they compressed.
_ONE_BIT = {"onebitadam": "Adam", "zerooneadam": "Adam", "onebitlamb": "Lamb"}


def _optimizer(raw: Block) -> Iterator[Finding]:
    if not isinstance(raw.get("optimizer"), dict):
        return
    yield from _unknown_keys(raw, "optimizer", ("type", "params", "legacy_fusion"))
    name, path = str(raw["optimizer"].get("type")), "optimizer.type"
    if name.startswith("apex."):
        if "pretrain" not in raw:  # pretrain.py builds it, and checks it as it loads the run
            why = f'{path}="{name}": DeepSpeed cannot build it'
            yield Finding("refused", path, why, "build it in your script, and pass it as initialize(optimizer=...)")
        return
    if name.lower() in _ONE_BIT:
        why, plain = f'{path}="{name}" has been removed from DeepSpeed', _ONE_BIT[name.lower()]
        yield Finding("refused", path, why, f'use "{plain}", without compression', _decompress)
    elif name.lower() not in deepspeed_config.DEEPSPEED_OPTIMIZERS and name not in TORCH_OPTIMIZERS:
        known = [*deepspeed_config.DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS]
        yield Finding("refused", path, f'{path}="{name}" is unknown', did_you_mean(name, known))
    elif name.lower() in ("muadam", "muadamw", "musgd") and importlib.util.find_spec("mup") is None:
        yield Finding("refused", path, f'{path}="{name}" needs the package mup, which is not installed', "pip install mup")
    else:
        yield from _optimizer_parameters(raw, name)
    path = "optimizer.params.max_grad_norm"
    if _has(raw, path):
        yield Finding("refused", path, f"DeepSpeed refuses {path}", "use gradient_clipping at the top level", _move_clipping)


def _optimizer_parameters(raw: Block, name: str) -> Iterator[Finding]:
    params = _block(raw, "optimizer", "params")
    offloads = _block(raw, "zero_optimization", "offload_optimizer").get("device", "none") != "none"
    model = optimizer_parameters(name, params, offloads)
    if model is not None:
        yield from _unknown_keys(raw, "optimizer.params", {*_names(model), "max_grad_norm"})
        yield from _values(params, "optimizer.params", model)
    path = "zero_allow_untested_optimizer"
    built = optimizer_class(name, params, offloads)
    if built is not None and built not in ZERO_SUPPORTED_OPTIMIZERS and zero_stage(raw) and not raw.get(path):
        why = f'optimizer.type="{name}": ZeRO has not been tested with it'
        yield Finding("refused", path, why, f'use "AdamW", or zero_optimization.stage 0, or set {path} to true')


def _decompress(config: Block) -> None:
    plain = _ONE_BIT[config["optimizer"]["type"].lower()]
    known = {"lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad"}
    if plain == "Lamb":
        known |= {"max_coeff", "min_coeff"}
    params = _block(config, "optimizer", "params")
    config["optimizer"] = {"type": plain, "params": {key: value for key, value in params.items() if key in known}}


def _move_clipping(config: Block) -> None:
    params = _block(config, "optimizer", "params")
    if "max_grad_norm" in params:
        config.setdefault("gradient_clipping", params.pop("max_grad_norm"))


def _scheduler(raw: Block) -> Iterator[Finding]:
    if not isinstance(raw.get("scheduler"), dict):
        return
    yield from _unknown_keys(raw, "scheduler", ("type", "params"))
    name, own = str(raw["scheduler"].get("type")), "pretrain" in raw
    known = [*SCHEDULES, *TRANSFORMERS_SCHEDULES] if own else SCHEDULES
    if name not in known:
        why, remedy = f'scheduler.type="{name}" is unknown', did_you_mean(name, known)
        if name in TRANSFORMERS_SCHEDULES:  # pretrain.py builds it
            why = f'scheduler.type="{name}": DeepSpeed cannot build it'
            remedy = "build it in your script by transformers.get_scheduler, and pass it as initialize(lr_scheduler=...)"
        yield Finding("refused", "scheduler.type", why, remedy)
        return
    wrapped = zero_stage(raw) or any(_block(raw, key).get("enabled") is True for key in ("fp16", "bf16"))
    if name not in (*VALID_LR_SCHEDULES, *TRANSFORMERS_SCHEDULES) and wrapped:
        why = f'scheduler.type="{name}": torch\'s schedules refuse the optimizers of ZeRO, fp16 and bf16'
        yield Finding("refused", "scheduler.type", why, f"use one of {', '.join(VALID_LR_SCHEDULES)}")
        return
    model, params = schedule_parameters(name), _block(raw, "scheduler", "params")
    yield from _unknown_keys(raw, "scheduler.params", {*_names(model), "num_stable_steps"})
    yield from _values(params, "scheduler.params", model)
    path = "scheduler.params.num_stable_steps"
    if "num_stable_steps" in params:
        yield Finding("refused", path, f"{path}: the stable steps are those that are left", "remove it", _removing(path))
    for key in PHASES:
        if not own and isinstance(params.get(key), float) and 0 < params[key] < 1:
            path = f"scheduler.params.{key}"
            why = f"{path}={params[key]}: a share of the steps, which DeepSpeed cannot count"
            yield Finding("refused", path, why, "write a number of steps")


# Facts: precision, parallelism, token dropping


_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def _monitors(raw: Block) -> Iterator[Finding]:
    """Monitors whose package is missing on this machine."""
    for block, package in _MONITORS.items():
        if _block(raw, block).get("enabled") is True and importlib.util.find_spec(package) is None:
            path = f"{block}.enabled"
            yield Finding(
                "refused",
                path,
                f"{path}=true needs the package {package}, which is not installed",
                f"pip install {package}, or remove {path}",
            )


def _two_precisions(raw: Block) -> Iterator[Finding]:
    if all(_block(raw, key).get("enabled") is True for key in ("fp16", "bf16")):
        yield Finding("refused", "bf16", "fp16.enabled and bf16.enabled are both true", "keep one of them")


def _older_forms(raw: Block) -> Iterator[Finding]:
    """Spellings of the ZeRO block that DeepSpeed still reads."""
    path, value = "zero_optimization", raw.get("zero_optimization")
    if isinstance(value, bool):
        remedy, change = f'write {{"stage": {int(value)}}}', _setting(path, {"stage": int(value)})
        yield Finding("deprecated", path, f"{path}={json.dumps(value)} is an older form", remedy, change)
    path = "zero_optimization.cpu_offload"
    if _has(raw, path):
        remedy = 'write "offload_optimizer": {"device": "cpu"}'
        yield Finding("deprecated", path, f"{path} is an older name", remedy, _rename_offload)


def _rename_offload(config: Block) -> None:
    if config["zero_optimization"].pop("cpu_offload"):
        config["zero_optimization"].setdefault("offload_optimizer", {"device": "cpu"})


def _layout(stage: int, sequence_parallel_size: int, pipeline: bool) -> Iterator[Finding]:
    """Parallel layouts that token dropping cannot use."""
    path = "zero_optimization.stage"
    if pipeline and stage != 1:
        why = (
            f"{path}={stage} with a pipeline: DeepSpeed has no pipeline with 2 and 3, and with 0 clips by the gradients of the "
            "first stage alone"
        )
        yield Finding("conflict", path, why, "use 1", _using_zero(1))
    elif stage == 3:
        why = f"{path}=3 is not supported: both passes of an align step would gather every parameter twice"
        yield Finding("conflict", path, why, "use stage 2", _using_zero(2))
    if sequence_parallel_size != 1:
        path = "sequence_parallel_size"
        why = f"{path}={sequence_parallel_size}: tokens are chosen from whole rows, but it splits rows over ranks"
        yield Finding("conflict", path, why, "use data parallelism", _removing(path))


def _using_zero(stage: int) -> Repair:
    def change(config: Block) -> None:
        block = _block(config, "zero_optimization")
        block.pop("offload_param", None)  # of ZeRO-3 alone
        config["zero_optimization"] = {**block, "stage": stage}

    return change


def _wants_pipeline(raw: Block) -> bool:
    """Whether the model is a pipeline, as far as the file says: pretrain.py's by its stages, others by DeepSpeed's block."""
    if "pretrain" not in raw:
        return bool(raw.get("pipeline"))
    stages = _block(raw, "pretrain").get("stages", 1)
    return isinstance(stages, int) and stages > 1


def _pipeline_block(raw: Block, pipeline: bool) -> Iterator[Finding]:
    """DeepSpeed's own block for pipelines."""
    path = "pipeline.activation_checkpoint_interval"
    if raw.get("pipeline") and not pipeline:
        remedy = "remove it, or set pretrain.stages" if "pretrain" in raw else "remove it"
        yield Finding("ignored", "pipeline", '"pipeline": nothing reads it, as the model has no pipeline stages', remedy)
    elif _block(raw, "pipeline").get("activation_checkpoint_interval"):
        remedy = "remove it; sctd.recompute_align saves memory in align steps"
        yield Finding("conflict", path, f"{path} cannot be used with token dropping", remedy, _removing(path))


def _sums_of_a_pipeline(raw: Block, pipeline: bool) -> Iterator[Finding]:
    """Gradients that are added up in fp32: DeepSpeed's pipeline looks for those of tied weights elsewhere, and finds none."""
    path = "data_types.grad_accum_dtype"
    dtype = _block(raw, "data_types").get("grad_accum_dtype")
    if pipeline and _block(raw, "fp16").get("enabled") and dtype not in (None, "fp16", "float16", "half"):
        why = f"{path}={json.dumps(dtype)} with fp16 in a pipeline: stages would not add up the gradient of the tied embedding"
        yield Finding("conflict", path, why, "remove it, or use bf16", _removing(path))


def _random_ltd(raw: Block) -> Iterator[Finding]:
    """DeepSpeed's own token dropping. It does nothing until the script also replaces the model's layers."""
    path, routing = "data_efficiency.data_routing", _block(raw, "data_efficiency", "data_routing")
    if routing.get("enabled") or _block(routing, "random_ltd").get("enabled"):
        why = f"{path}: random-LTD drops tokens, too, and replaces the layers"
        yield Finding("warning", path, why, "switch it off", _switch_off_routing)


def _switch_off_routing(config: Block) -> None:
    routing = config["data_efficiency"]["data_routing"]
    for block in (routing, _block(routing, "random_ltd")):
        block["enabled"] = False


def _without_throughput_timer(config: Block) -> None:
    config.setdefault("timers", {}).setdefault("throughput", {})["enabled"] = False


THROUGHPUT_TIMER = Finding(
    "warning",
    "timers.throughput",
    "timers.throughput: DeepSpeed's throughput timer is on, as it is by default, and stops the host twice per micro-batch",
    'add "timers": {"throughput": {"enabled": false}}',
    _without_throughput_timer,
)


def _host_stops(raw: Block) -> Iterator[Finding]:
    """What keeps the host from running ahead of the device. pretrain.py switches the timer off."""
    timer = {"enabled": True, "synchronized": True, **_block(raw, "timers", "throughput")}
    if "pretrain" not in raw and timer["enabled"] and timer["synchronized"]:
        yield THROUGHPUT_TIMER


# "auto" values that pretrain.py replaces (see run/settings.py), and those that DeepSpeed itself understands.
_RESOLVED = {"gradient_accumulation_steps"} | {
    f"scheduler.params.{key}" for key in ("total_num_steps", "num_training_steps", "warmup_max_lr")
}
_UNDERSTOOD = {"pipeline.stages", "data_types.keep_in_fp32_modules"}


def _unresolved(raw: Block) -> Iterator[Finding]:
    """Values "auto", which the Hugging Face Trainer fills in. Elsewhere DeepSpeed takes a default, or stumbles over them."""
    fine = _UNDERSTOOD | (_RESOLVED if "pretrain" in raw else set())
    for path, value in leaves(raw):
        key = ".".join(path)
        if value == "auto" and key not in fine and path[0] not in ("sctd", "pretrain") and "zenflow" not in path:
            remedy = "write the value, unless the Hugging Face Trainer reads this file"
            yield Finding("ignored", key, f'{key} is "auto", which nothing here resolves', remedy)


def _no_method(raw: Block) -> Iterator[Finding]:
    if "sctd" not in raw:
        block = ScTDConfig().model_dump(include={"method", "interval", "drop_ratio", "kl_weight", "keep_token_ids"})
        remedy = "add the block; set keep_token_ids to UNK, CLS, SEP and MASK"
        yield Finding("missing", "sctd", 'the block "sctd", the method\'s settings', remedy, _setting("sctd", block))
