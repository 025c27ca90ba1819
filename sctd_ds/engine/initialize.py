"""The door for recipes: `deepspeed.initialize` for a model that trains with token dropping."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from sctd_ds.config import ConfigError, ScTDConfig, one_line, read_json, sctd_block
from sctd_ds.deepspeed_json import THROUGHPUT_TIMER, check, check_layout
from sctd_ds.engine.data_parallel import ScTDEngine
from sctd_ds.engine.operations import compiling
from sctd_ds.engine.pipeline import ScTDPipelineEngine
from sctd_ds.engine.ranks import release_shared_memory, remove_leaked_memory
from sctd_ds.method.convert import convert, is_converted, state_of

logger = logging.getLogger(__name__)

ENGINES: dict[type, type] = {DeepSpeedEngine: ScTDEngine, PipelineEngine: ScTDPipelineEngine}
"""The engines that `deepspeed.initialize` builds, and what they become."""

REPLACED_BY = {"optimizer": "optimizer", "scheduler": "lr_scheduler"}
"""Blocks of the configuration that DeepSpeed does not read where this argument is passed."""


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    *rest: Any,
    config: Any = None,
    config_params: Any = None,
    sctd_config: ScTDConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize for a model that trains with token dropping: same arguments, same four values.

    The method comes from `sctd_config`, or from the "sctd" block of the DeepSpeed configuration (`config`, `config_params`
    or args.deepspeed_config); a model that is converted already keeps its own. Raises ValueError for a configuration
    without either, for unknown keys in it, and for what cannot work (ZeRO-3, a model family without an adapter, settings for
    which DeepSpeed builds no engine).
    """
    given = config if config is not None else config_params
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    if given is not None:
        raw, _ = read_json(given)
        passed = inspect.signature(deepspeed.initialize).bind_partial(args, model, *rest, **kwargs).arguments
        unread = {"pretrain"}
        unread |= {block for block, name in REPLACED_BY.items() if passed.get(name) is not None}
        check({key: value for key, value in raw.items() if key not in unread}, isinstance(model, PipelineModule))
    if model is None:
        raise ValueError("sctd_ds.initialize needs model=")
    block = sctd_config if sctd_config is not None else sctd_block(given)
    if isinstance(model, PipelineModule):
        _refuse_other(state_of(model).config, block)
    elif block is not None:
        convert(model, block if isinstance(block, ScTDConfig) else ScTDConfig(**block))
    elif not is_converted(model):
        raise ConfigError(
            'no ScTD settings: add an "sctd" block to the DeepSpeed configuration (an empty one means the defaults), '
            "or pass sctd_config="
        )
    remove_leaked_memory()
    try:
        with compiling():
            values = deepspeed.initialize(args, model, *rest, config=config, config_params=config_params, **kwargs)
    except Exception as error:  # assertions, import errors, ...: for settings that it cannot combine DeepSpeed has no type
        raise ConfigError(f"DeepSpeed cannot build an engine with this configuration ({one_line(error)})") from error
    attach(values[0])
    return values


def attach(engine: Any) -> Any:
    """Turn a DeepSpeed engine around a converted model into one of ours, in place. Raises ValueError for other engines."""
    if type(engine) not in ENGINES and type(engine) not in ENGINES.values():
        raise ValueError(f"{type(engine).__name__} is not supported; supported: {', '.join(e.__name__ for e in ENGINES)}")
    check_layout(engine.zero_optimization_stage(), engine.sequence_parallel_size, isinstance(engine.module, PipelineModule))
    # deepspeed.initialize chooses the class itself; the subclass adds no construction of its own.
    engine.__class__ = ENGINES.get(type(engine), type(engine))
    engine._attach()
    timer, accelerator = engine.tput_timer.config, get_accelerator()
    if timer.enabled and timer.synchronized and not accelerator.is_synchronized_device() and engine.global_rank == 0:
        logger.warning("%s", THROUGHPUT_TIMER)
    release_shared_memory()
    return engine


def _refuse_other(config: ScTDConfig, block: ScTDConfig | Mapping[str, Any] | None) -> None:
    """ConfigError for settings other than those that the pipeline was built and partitioned with."""
    wanted = block if isinstance(block, ScTDConfig) else ScTDConfig(**(block or {}))
    for key in sorted(wanted.model_fields_set):
        built, asked = getattr(config, key), getattr(wanted, key)
        if built != asked:
            raise ConfigError(
                f"sctd.{key}={asked!r}, but the pipeline was built with {built!r}: build it with the same settings"
            )
