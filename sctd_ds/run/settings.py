"""One JSON file describes one run: read, overridden, checked and resolved."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from sctd_ds.adapters.architectures import PRESETS
from sctd_ds.config import (
    Block,
    ConfigError,
    PretrainConfig,
    ScTDConfig,
    counted,
    json_block,
    leaves,
    one_line,
    parse_json,
    read_json,
)
from sctd_ds.deepspeed_json import check, replicas, zero_stage
from sctd_ds.deepspeed_schema import (
    ADAM_SWITCHES,
    PHASES,
    TRANSFORMERS_SCHEDULES,
    optimizer_class,
    schedule_class,
    schedule_parameters,
)
from sctd_ds.integrations import apex, schedules
from sctd_ds.method.schedule import dropping_phase


@dataclass(frozen=True)
class RunConfig:
    """A validated run: what DeepSpeed gets, the method, the run, and what was resolved on the way (`notes`)."""

    name: str
    """Names the run's folder: that of the file, and the method where it is not the file's."""
    deepspeed: Block
    sctd: ScTDConfig
    pretrain: PretrainConfig
    micro_batch: int
    accumulation: int
    world_size: int
    """Data-parallel ranks; with pipeline stages, replicas of the pipeline."""
    apex_optimizer: Block | None = None
    """The file's "optimizer" block where apex builds the optimizer (`models.build_optimizer`); DeepSpeed does not get it."""
    transformers_schedule: Block | None = None
    """The file's "scheduler" block where it names a schedule of transformers (`schedules.of`); DeepSpeed does not get it."""
    from_steps: frozenset[str] = frozenset()
    """Dotted keys whose values follow from pretrain.steps, because the file has "auto" or a share there."""
    notes: tuple[str, ...] = ()
    """For the user."""

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
        sctd = self.sctd.model_dump(exclude={"total_steps"})  # it is pretrain.steps
        blocks = {**self.whole_deepspeed(), "sctd": sctd, "pretrain": self.pretrain.model_dump()}
        return {".".join(path): value for path, value in leaves(blocks)}

    def whole_deepspeed(self) -> Block:
        """A copy of DeepSpeed's part of the file, resolved, with the blocks that DeepSpeed does not get."""
        taken = {"optimizer": self.apex_optimizer, "scheduler": self.transformers_schedule}
        return copy.deepcopy({**self.deepspeed, **{key: block for key, block in taken.items() if block is not None}})


def shipped() -> dict[str, Path]:
    """The configurations that come with this package, by name."""
    package = Path(__file__).resolve().parents[1]
    # Beside the package in a checkout, inside of it where it is installed.
    folder = next(path for path in (package / "ds_configs", package.parent / "ds_configs") if path.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def find(source: str | Path) -> Path:
    """The configuration file `source`, or the shipped one of that name; a file wins. Raises ConfigError for neither."""
    path = Path(source)
    if path.exists():
        return path
    if str(source) not in shipped():
        raise ConfigError(f"{source}: no such configuration file; by name there are {', '.join(shipped())}")
    return shipped()[str(source)]


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    world_size: int = 1,
    method: str | None = None,
) -> RunConfig:
    """Read, override, check and resolve a run's configuration.

    source: a JSON file, the name of a shipped one, or its content as a mapping. overrides: "dotted.key=value", value in JSON
    or a bare word.
    world_size: processes of the run. method: train with this one in place of the file's, under a name of its own.
    Raises ConfigError.
    """
    # Read the file, and change what the command line asks for
    raw, name = read_json(source if isinstance(source, Mapping) else find(source))
    if method is not None:
        of_file = json_block(raw, "sctd").get("method", ScTDConfig().method)
        name = name if method == of_file else f"{name}_{method}"
        overrides = [f"sctd.method={method}", *overrides]
    for item in overrides:
        _apply_override(raw, item)

    # Check all of it
    raw.setdefault("pretrain", {})
    check(raw)
    deepspeed = {key: value for key, value in raw.items() if key not in ("sctd", "pretrain")}
    pretrain = PretrainConfig(**json_block(raw, "pretrain"))
    sctd = _count_phases(ScTDConfig(**json_block(raw, "sctd")), pretrain.steps)
    if method not in (None, sctd.method):
        raise ConfigError(f'--method {method}, but --set makes sctd.method "{sctd.method}": use one of them')
    _check_together(pretrain, sctd)

    # Fill in what follows from other keys, and from the machine
    pipelines = replicas(world_size, pretrain.stages)
    micro, accumulation = _resolve_batch(deepspeed, pipelines)
    from_steps = _resolve_schedule(deepspeed, pretrain)
    # The run records its own throughput; DeepSpeed's timer would stop the host twice per micro-batch.
    deepspeed.setdefault("timers", {"throughput": {"enabled": False}})
    optimizer = _take_apex_optimizer(deepspeed)
    notes = _resolve_precision(deepspeed) + _warnings(deepspeed, optimizer, pretrain)
    schedule = _take_transformers_schedule(deepspeed)
    _rehearse(deepspeed, schedule)
    return RunConfig(name, deepspeed, sctd, pretrain, micro, accumulation, pipelines, optimizer, schedule, from_steps, notes)


def _check_together(pretrain: PretrainConfig, sctd: ScTDConfig) -> None:
    """ConfigError for keys of which each is fine, but not beside the other."""
    if pretrain.evaluate and pretrain.stages > 1:
        raise ConfigError(
            f"pretrain.evaluate needs the whole model, and with pretrain.stages={pretrain.stages} no rank has it: remove the "
            "key, and evaluate the exported model (python -m sctd_ds.eval)"
        )
    if pretrain.early_stopping and not pretrain.validation_every:
        raise ConfigError(
            f"pretrain.early_stopping={pretrain.early_stopping} counts validations, but pretrain.validation_every is 0: set it"
        )
    if pretrain.early_stopping and sctd.dense_finish:
        raise ConfigError(
            "pretrain.early_stopping with sctd.dense_finish: a run that stops early never comes to its dense steps at the end; "
            "remove one of them"
        )
    if pretrain.tokenizer and pretrain.trained_model:
        raise ConfigError(
            f'pretrain.tokenizer="{pretrain.tokenizer}", but the trained model {pretrain.trained_model} brings its own: '
            "remove the key (into a model folder without one, save the tokenizer)"
        )


def _count_phases(sctd: ScTDConfig, steps: int) -> ScTDConfig:
    """The method, told the length of the run. Raises ConfigError for dense phases that leave no step to drop tokens in."""
    if sctd.total_steps not in (None, steps):
        raise ConfigError(f"sctd.total_steps={sctd.total_steps}, but pretrain.steps={steps}: remove sctd.total_steps")
    sctd = sctd.model_copy(update={"total_steps": steps})
    dropping_phase(sctd)
    return sctd


def _apply_override(raw: Block, item: str) -> None:
    """Set one key of the file. Raises ConfigError for what is not KEY=VALUE, and for a path that leads nowhere."""
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise ConfigError(f'--set "{item}": expected dotted.key=value, for example sctd.interval=20')
    try:
        value = parse_json(text, path)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'--set "{item[:80]}": {error}') from None
    *blocks, key = path.split(".")
    for part in blocks:
        inner = raw.setdefault(part, {})
        if part == "model" and isinstance(inner, str) and inner in PRESETS:  # a preset, with one of its sizes changed
            inner = raw[part] = dict(PRESETS[inner])
        if part == "model" and isinstance(inner, str):
            raise ConfigError(f'--set "{item}": pretrain.model="{inner}" is a trained model, whose sizes cannot be changed')
        if not isinstance(inner, dict):
            raise ConfigError(f'--set "{item}": "{part}" is not a block')
        raw = inner
    raw[key] = value


def _resolve_batch(config: Block, world_size: int) -> tuple[int, int]:
    """Fill in the missing one of the three batch keys; returns (micro batch, accumulation steps)."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (None if config.get(key) == "auto" else config.get(key) for key in keys)
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
            f"x {counted(world_size, 'rank', 'ranks')}: choose a micro batch and a number of ranks whose "
            f"product divides {total}"
        )
    config.update(zip(keys, (total, micro, steps), strict=True))
    return micro, steps


def _resolve_schedule(config: Block, pretrain: PretrainConfig) -> frozenset[str]:
    """Fill in the schedule's length, its peak, and steps that are a share of its length.

    Returns the dotted keys whose values follow from pretrain.steps.
    """
    block = config.get("scheduler", {})
    params = block.get("params", {})
    length = "total_num_steps"
    if block.get("type") in TRANSFORMERS_SCHEDULES:
        length = "num_training_steps"
        if length in schedule_parameters(block["type"]).model_fields:
            params.setdefault(length, "auto")
    # Steps
    from_run = params.get(length, "auto") == "auto"
    total = pretrain.steps if from_run else params[length]
    resolved = {key: max(1, round(x * total)) for key, x in params.items() if key in PHASES and 0 < x < 1}
    if length in params:
        resolved[length] = total
    params.update(resolved)
    phases = {key: params[key] for key in PHASES if key in params}
    decays = "num_decay_steps" in phases
    if length in params and sum(phases.values()) >= total + decays:
        sizes = " + ".join(f"{key}={value}" for key, value in phases.items())
        raise ConfigError(f"scheduler.params.{sizes} must {'not exceed' if decays else 'be below'} {length}={total}")
    # Peak
    if params.get("warmup_max_lr") == "auto":
        rate = config.get("optimizer", {}).get("params", {}).get("lr")
        if rate is None:
            raise ConfigError('scheduler.params.warmup_max_lr is "auto", but optimizer.params.lr is not set')
        params["warmup_max_lr"] = rate
    return frozenset(f"scheduler.params.{key}" for key in resolved if from_run)


def _resolve_precision(config: Block) -> tuple[str, ...]:
    """Replace fp16 by bf16 where the device has no fp16; returns what to tell the user."""
    accelerator = get_accelerator()
    if not config.get("fp16", {}).get("enabled") or accelerator.is_fp16_supported():
        return ()
    config.pop("fp16")
    config["bf16"] = {"enabled": True}
    return (f'The device "{accelerator.device_name()}" has no fp16: training in bf16 instead.',)


def _take_apex_optimizer(config: Block) -> Block | None:
    """Take an optimizer of apex out of DeepSpeed's configuration; None where DeepSpeed builds it. Raises ConfigError."""
    block = config.get("optimizer", {})
    if not apex.is_apex(block.get("type")):
        return None
    apex.check_optimizer(block["type"], block.get("params", {}))
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True  # ZeRO asks for it with an optimizer that it does not know
    return block


def _take_transformers_schedule(config: Block) -> Block | None:
    """Take a schedule of transformers out of DeepSpeed's configuration; None where DeepSpeed builds it."""
    return config.pop("scheduler") if config.get("scheduler", {}).get("type") in TRANSFORMERS_SCHEDULES else None


def _warnings(config: Block, optimizer: Block | None, pretrain: PretrainConfig) -> tuple[str, ...]:
    """What works, but not as its name promises."""
    found = []
    stage = zero_stage(config)
    if optimizer is not None and optimizer["type"] == "apex.FusedLAMB" and stage > 0:
        found.append(
            f"optimizer.type=apex.FusedLAMB with zero_optimization.stage={stage}: ZeRO gives it one flat tensor per rank, so "
            "its trust ratio is one for all of a rank's parameters. Stage 0 has one per layer."
        )
    lengths = {"total_num_steps", "num_training_steps"}  # of a rate that decays to the end
    if pretrain.early_stopping and lengths & config.get("scheduler", {}).get("params", {}).keys():
        found.append(
            "pretrain.early_stopping with a learning rate that decays: a run that stops early misses the end of the decay. "
            "A constant rate, and a decay from its last checkpoint, suit it better (docs/configuration.md)."
        )
    return tuple(found)


def _rehearse(config: Block, of_transformers: Block | None) -> None:
    """DeepSpeed reads the configuration, and the optimizer and the schedule take some steps with one parameter.

    of_transformers: the "scheduler" block where DeepSpeed does not get it. What is refused in the engine otherwise, when data
    and model are ready, or in the middle of training, raises ConfigError here.
    """
    sizes = {"train_batch_size"}  # it follows from the others and the number of ranks that DeepSpeed finds
    with _blaming("the configuration"):
        DeepSpeedConfig(copy.deepcopy({key: value for key, value in config.items() if key not in sizes}))
    block, schedule = config.get("optimizer", {}), of_transformers or config.get("scheduler", {})
    params = {key: value for key, value in block.get("params", {}).items() if key not in ADAM_SWITCHES}
    built = optimizer_class(block.get("type", "AdamW"), block.get("params", {}), offloads=False)
    if built is None or not issubclass(built, torch.optim.Optimizer) or not built.__module__.startswith("torch.optim"):
        built, params = torch.optim.AdamW, {}  # a stand-in for what would have to be compiled
    weight = nn.Parameter(torch.ones(2, 2, device=get_accelerator().current_device_name()))
    with _blaming(f"optimizer.type={block.get('type')}"):
        optimizer = built([weight], **params)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    if "type" not in schedule:
        return
    with _blaming(f"scheduler.type={schedule['type']}"):
        build = schedules.of(of_transformers) or partial(schedule_class(schedule["type"]), **schedule.get("params", {}))
        scheduler = build(optimizer)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            float(scheduler.get_last_lr()[0])


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Whatever is raised inside as a ConfigError of one line."""
    try:
        yield
    except Exception as error:  # assertions, type and attribute errors: they have no type of their own for bad values
        raise ConfigError(f"{what} cannot be used ({one_line(error)})") from None
