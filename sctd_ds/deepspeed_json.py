"""What may stand in a DeepSpeed configuration file, and what is wrong with one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    pass
from sctd_ds.config import ConfigError, did_you_mean, explain

# Top-level keys that DeepSpeed 0.19 reads. It has no list of its own; a test holds this one against its sources.
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint checkpoint_writer comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization zenflow vocabulary_size
    """.split()
)


def read_json(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The configuration as a dict of its own, and a short name for it."""
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source)), "run"
    path = Path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content, path.stem


def check_top_level(raw: Mapping[str, Any], extra: Iterable[str] = ()) -> None:
    """Refuse top-level keys that neither DeepSpeed nor we read, and those DeepSpeed has removed."""
    from deepspeed.runtime import config as deepspeed_config

    removed = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    known = DEEPSPEED_KEYS | set(extra)
    for key in raw:
        if key in removed:
            doctor = "python -m sctd_ds.doctor check FILE --write"
            raise ConfigError(f'"{key}": {removed[key]} Remove the block; `{doctor}` repairs the whole file.')
        if key not in known:
            raise ConfigError(f'unknown key "{key}"{did_you_mean(key, known)}')


def block_models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's own models of those nested blocks for which it has one."""
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
    }


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Check DeepSpeed's nested blocks, with its own models where it has them, before anything is built."""
    for key, model in block_models().items():
        if key in config:
            block = json_block(config, key)
            try:
                model(**block)
            except ValidationError as error:
                raise ConfigError(explain(error, key, model.model_fields)) from None
    _check_optimizer(config)
    _check_scheduler(config)
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise ConfigError("fp16.enabled and bf16.enabled are both true: choose one")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise ConfigError(
            "zero_optimization.stage=3 is not supported: both passes of an align step would gather every parameter twice; "
            "use stage 2"
        )
    if config.get("pipeline") and stage >= 2:
        raise ConfigError(f"a pipeline cannot run with zero_optimization.stage={stage} (DeepSpeed allows 0 and 1): use 1")


def sctd_block(config: Any) -> dict[str, Any] | None:
    """The "sctd" block of a DeepSpeed configuration given as a path or a dict; None where it has none."""
    if config is None:
        return None
    raw, _ = read_json(config)
    return json_block(raw, "sctd") if "sctd" in raw else None


def _check_optimizer(config: Mapping[str, Any]) -> None:
    import torch
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    if "optimizer" not in config:
        return
    block = json_block(config, "optimizer")
    _only(block, ("type", "params", "legacy_fusion"), "optimizer")
    torch_names = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != "Optimizer"]
    name, known = block.get("type"), [*DEEPSPEED_OPTIMIZERS, *torch_names]
    # DeepSpeed compares its own names in lower case and looks others up in torch.optim as they are.
    if not isinstance(name, str) or (name.lower() not in DEEPSPEED_OPTIMIZERS and name not in torch_names):
        raise ConfigError(f'optimizer.type="{name}" is unknown{did_you_mean(str(name), known)}')
    if name.lower() in ("adam", "adamw"):
        keys = {*inspect.signature(FusedAdam).parameters, *inspect.signature(torch.optim.AdamW).parameters}
        _only(block.get("params", {}), {*keys, "torch_adam", "adam_w_mode"} - {"params"}, "optimizer.params")


def _check_scheduler(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime import lr_schedules

    if "scheduler" not in config:
        return
    block = json_block(config, "scheduler")
    _only(block, ("type", "params"), "scheduler")
    name = str(block.get("type"))
    if name not in lr_schedules.VALID_LR_SCHEDULES:
        raise ConfigError(f'scheduler.type="{name}" is unknown{did_you_mean(name, lr_schedules.VALID_LR_SCHEDULES)}')
    known = inspect.signature(getattr(lr_schedules, name)).parameters
    _only(block.get("params", {}), set(known) - {"optimizer"}, "scheduler.params")


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every innermost value of nested mappings, with its path."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def json_block(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f'"{key}" must be a JSON object, found {value!r}')
    return dict(value)


def _only(block: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = set(known)
    for key in block:
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in {where}{did_you_mean(key, known)}')


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f'the key "{key}" stands twice in one block')
        seen[key] = value
    return seen


def check_layout(zero_stage: int, sequence_parallel_size: int = 1, pipeline: bool = False) -> None:
    """ConfigError for a parallel layout that token dropping cannot use."""
    if pipeline and zero_stage != 1:
        raise ConfigError(
            f"zero_optimization.stage={zero_stage} with a pipeline: use 1. DeepSpeed has no pipeline with 2 and 3, and with 0 "
            "clips by the gradients of the first stage alone"
        )
    if zero_stage == 3:
        raise ConfigError(
            "zero_optimization.stage=3 is not supported: both passes of an align step would gather every parameter twice; "
            "use stage 2"
        )
    if sequence_parallel_size > 1:
        raise ConfigError(
            f"sequence_parallel_size={sequence_parallel_size}: tokens are chosen from whole rows, which sequence parallelism "
            "splits over ranks; use data parallelism"
        )
