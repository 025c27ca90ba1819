"""What DeepSpeed's configuration may hold, as pydantic models: its blocks, and the parameters of optimizers and schedules.

DeepSpeed describes some blocks by models of its own. The others are derived from its sources here: from the defaults of a
block, or from the signature of the class that gets the parameters. A value then has the type of its default, and a number
whose default is not negative must not be negative.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.data_pipeline import config as data_efficiency
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.model_checkpointing import config as checkpoint
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from sctd_ds.config import PretrainConfig, ScTDConfig

Model = type[BaseModel]


def model_of(fields: Mapping[str, Any]) -> Model:
    """A model of optional fields, by their types; a field of the type (type, ...) is required."""
    given: Any = {key: kind if isinstance(kind, tuple) else (kind, None) for key, kind in fields.items()}
    strict = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model("Block", __config__=strict, **given)


def like(defaults: object, **types: Any) -> Model:
    """A model of the keys in `defaults`, a dict or the attributes of an object, each like its default or as in `types`."""
    values = defaults if isinstance(defaults, dict) else vars(defaults)
    return model_of({**{key: _type_of(value) for key, value in values.items()}, **types})


def _type_of(default: Any) -> Any:
    if default is None:
        return Any
    if isinstance(default, dict):
        return like(default)
    if isinstance(default, tuple):
        return tuple[tuple(_type_of(value) for value in default)]  # type: ignore[misc]
    if isinstance(default, int | float) and not isinstance(default, bool) and default >= 0:
        return Annotated[type(default), Field(ge=0)]
    return type(default)


def _upper_case(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _word(*words: str) -> Any:
    """One of some words, which DeepSpeed reads in any case."""
    return Annotated[Literal[words], BeforeValidator(_upper_case)] | None


# Blocks

Count = Annotated[int, Field(ge=1)]
Rows = Annotated[int, Field(ge=1, strict=True)]  # nothing turns 8.0 into 8 later
Precision = Literal["fp16", "bf16", "fp32"] | None
_EFFICIENCY = data_efficiency.get_data_efficiency_config({})


def _constants(prefix: str) -> Model:
    """The keys that DeepSpeed's data library names by constants of this prefix, of any type."""
    names = [value for name, value in vars(data_efficiency).items() if name.startswith(prefix) and isinstance(value, str)]
    return model_of(dict.fromkeys(names, Any))


BLOCKS: dict[str, Model] = {
    "sctd": ScTDConfig,
    "pretrain": PretrainConfig,
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "hybrid_engine": deepspeed_config.HybridEngineConfig,
    "weight_quantization": WeightQuantConfig,
    "timers": model_of({"throughput": DeepSpeedThroughputTimerConfig}),
    "tensor_parallel": type(deepspeed_config.get_tensor_parallel_config({})),
    "expert_parallel": like({key: None for key in vars(AutoEPConfig()) if not key.startswith("_")}),
    "activation_checkpointing": like(
        deepspeed_config.DeepSpeedActivationCheckpointingConfig({}), number_checkpoints=Count | None
    ),
    "flops_profiler": like(deepspeed_config.DeepSpeedFlopsProfilerConfig({}), output_file=str | None, profile_step=Count),
    "aio": like(get_aio_config({})),
    "autotuning": like(deepspeed_config.DeepSpeedAutotuningConfig({})),
    "pipeline": like(deepspeed_config.get_pipeline_config({}), stages=Count | Literal["auto"]),
    "checkpoint": like(
        checkpoint.get_checkpoint_config({"checkpoint": {}}),
        tag_validation=_word(*checkpoint.CHECKPOINT_TAG_VALIDATION_MODES),
        load_universal=bool,
        use_node_local_storage=bool,
        parallel_write=model_of({"pipeline_stage": bool}),
        writer=like(
            checkpoint.get_checkpoint_writer_config({"writer": {}}),
            type=_word(*checkpoint.CHECKPOINT_WRITER_TYPES),
            data_parallel=_word(*checkpoint.CHECKPOINT_DATA_PARALLEL_UNITS),
        ),
    ),
    "data_types": model_of(
        {
            "grad_accum_dtype": Precision,
            "param_dtype": Precision,
            "buffer_dtype": Precision,
            "keep_in_fp32_modules": list[str] | Literal["auto"],
        }
    ),
    "torch_autocast": model_of(
        {
            "enabled": bool,
            "dtype": Literal[tuple(name for kind in (DtypeEnum.fp16, DtypeEnum.bf16) for name in kind._all_values[1:])],
            "lower_precision_safe_modules": list[str] | None,
        }
    ),
    "data_efficiency": like(
        _EFFICIENCY,
        data_sampling=like(
            _EFFICIENCY["data_sampling"],
            curriculum_learning=_constants("CURRICULUM_LEARNING_"),
            dynamic_batching=_constants("DYNAMIC_BATCHING_"),
        ),
        data_routing=like(_EFFICIENCY["data_routing"], random_ltd=_constants("RANDOM_LTD_")),
    ),
}
"""Blocks of the file."""

_SWITCHES = """
    dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation memory_breakdown
    prescale_gradients use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
VALUES = model_of(
    {
        **dict.fromkeys(_SWITCHES, bool),
        "train_batch_size": Rows | None,
        "train_micro_batch_size_per_gpu": Rows | None,
        "gradient_accumulation_steps": Rows | None,
        "steps_per_print": Count | None,
        "gradient_clipping": Annotated[float, Field(ge=0)],
        "gradient_predivide_factor": Annotated[float, Field(gt=0)],
        "gradient_allreduce_op": Literal["mean", "sum"],
        "communication_data_type": Precision,
        "seq_parallel_communication_data_type": Precision,
        "sequence_parallel_size": Count,
        "data_parallel_size": Count,
        "vocabulary_size": Count | None,
        "log_level": str | None,
        "datastates_ckpt": Any,
        "checkpoint_writer": Any,
        "zenflow": Any,
    }
)
"""Keys at the top level with a bare value."""

DEEPSPEED_KEYS = frozenset({*BLOCKS, *VALUES.model_fields, "optimizer", "scheduler"} - {"sctd", "pretrain"})
"""Top-level keys that DeepSpeed 0.19 reads. It has no list of its own; a test compares this one with its sources."""


def inner(model: Model, key: str) -> Model | None:
    """The model of a block inside of a block; None for a bare value."""
    field = model.model_fields.get(key)
    kinds = () if field is None else (field.annotation, *typing.get_args(field.annotation))
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


# Optimizers and schedules

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]
Rates = Rate | list[Rate]
"""One for all groups of parameters, or one for each."""
_PART = Annotated[float, Field(gt=0, lt=1)]
_RANGES: dict[str, Any] = {
    "lr": (Positive, None),
    "betas": (tuple[Share, Share], None),
    "eps": (Annotated[float, Field(ge=0, le=1)], None),
    "warmup_type": (Literal[lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE], None),
    "warmup_num_steps": (Count | _PART, None),
    "total_num_steps": (Count, ...),
    "num_warmup_steps": (Annotated[int, Field(ge=0)] | _PART, ...),
    "num_decay_steps": (Count | _PART, ...),
    "num_training_steps": (Count, None),
    "warmup_min_lr": (Rates, None),
    "warmup_max_lr": (Positive | list[Positive] | None, None),
    "cycle_min_lr": (Rates, ...),
    "cycle_max_lr": (Rates, ...),
    "lr_range_test_min_lr": (Rates, None),
    "cycle_first_step_size": (Count, None),
}
"""Parameters of which more is known than their signature says."""

TORCH_OPTIMIZERS = [name for name, value in vars(torch.optim).items() if inspect.isclass(value) and name != "Optimizer"]
SCHEDULES = [*lr_schedules.VALID_LR_SCHEDULES, *torch.optim.lr_scheduler.__all__]
"""DeepSpeed's own, and where it looks next."""
_OF_TRANSFORMERS: Any = TYPE_TO_SCHEDULER_FUNCTION
TRANSFORMERS_SCHEDULES: dict[str, Callable[..., Any]] = {
    f"transformers.{kind.value}": function
    for kind, function in _OF_TRANSFORMERS.items()
    if "num_warmup_steps" in inspect.signature(function).parameters  # the others are constant, or follow the loss
}
"""Values of scheduler.type that name a schedule of transformers, with its function. Not DeepSpeed but pretrain.py builds them
(`integrations.schedules`)."""
PHASES = ("warmup_num_steps", "num_warmup_steps", "num_decay_steps")
"""Keys of scheduler.params that are steps, or for pretrain.py a share (0 < x < 1) of the schedule's."""


def _signature(function: Callable[..., Any], **types: Any) -> Model:
    """A model of the parameters of a class, or a function, that is called with what stands in the file."""
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)  # type: ignore[misc]
    except NameError:  # names that torch imports for type checkers only
        hints = {}
    fields = {}
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        # What is written as 0 there is often a float.
        kind = hints.get(name, float if type(default) is int else _type_of(default))
        if isinstance(default, int | float) and not isinstance(default, bool) and default >= 0:
            kind = Annotated[kind, Field(ge=0)]
        fields[name] = (kind, ... if required else None)
    known = {**fields, **{name: kind for name, kind in _RANGES.items() if name in fields}, **types}
    return model_of({name: kind for name, kind in known.items() if name not in _NOT_FROM_THE_FILE})


_NOT_FROM_THE_FILE = set(
    "params model_params optimizer adamw_mode max_grad_norm args kwargs last_epoch num_stable_steps".split()
)
"""What a run or DeepSpeed passes itself, and what a finding of its own is about."""


def optimizer_class(name: str, params: Mapping[str, Any], offloads: bool) -> type | None:
    """The class that DeepSpeed builds for an optimizer.type; None for an unknown type.

    params: optimizer.params. offloads: whether ZeRO keeps the optimizer's state in the host's memory.
    """
    if name.lower() in ("adam", "adamw"):
        if params.get("torch_adam"):
            return torch.optim.AdamW if name.lower() == "adamw" or params.get("adam_w_mode", True) else torch.optim.Adam
        return DeepSpeedCPUAdam if offloads else FusedAdam
    both = {
        "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        "lion": (FusedLion, DeepSpeedCPULion),
        "lamb": (FusedLamb, FusedLamb),
    }
    if name.lower() in both:
        return both[name.lower()][offloads]
    own = name.lower() in deepspeed_config.DEEPSPEED_OPTIMIZERS  # "Muon" is not torch's
    return getattr(torch.optim, name) if name in TORCH_OPTIMIZERS and not own else None


def optimizer_parameters(name: str, params: Mapping[str, Any], offloads: bool) -> Model | None:
    """What optimizer.params may hold, as for `optimizer_class`; None where that is not known."""
    if name.lower() == "muon":
        keys = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"}
        rate = _RANGES["lr"]
        known = {**dict.fromkeys(keys, Rate), "ns_method": str, "muon_lr": rate, "adam_lr": rate}
        return model_of({**known, **{key: _RANGES[key] for key in ("lr", "betas", "eps")}, **ADAM_SWITCHES})
    built = optimizer_class(name, params, offloads)
    if built is None:
        return None
    switches = ADAM_SWITCHES if name.lower() in ("adam", "adamw") else {}
    own = {"amsgrad": Literal[False]} if built.__module__.startswith("deepspeed.ops") else {}
    return _signature(built, **switches, **own)


ADAM_SWITCHES: dict[str, Any] = {"torch_adam": bool, "adam_w_mode": bool, "fp32_optimizer_states": bool}
"""By the first two DeepSpeed chooses a class for "Adam"; all are its own."""


def schedule_class(name: str) -> type:
    """The class that DeepSpeed builds for a scheduler.type in SCHEDULES."""
    return getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)


def schedule_parameters(name: str) -> Model:
    """What scheduler.params may hold for a type in SCHEDULES or TRANSFORMERS_SCHEDULES."""
    if name not in TRANSFORMERS_SCHEDULES:
        return _signature(schedule_class(name))
    function = TRANSFORMERS_SCHEDULES[name]
    # Its words are others than DeepSpeed's; the function itself checks them.
    return _signature(function, **({"warmup_type": str} if "warmup_type" in inspect.signature(function).parameters else {}))
