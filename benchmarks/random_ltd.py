"""DeepSpeed's random layer token drop (random-LTD) around an untouched Hugging Face BERT, for comparison.

Each dropping layer gathers its own random tokens, runs on them alone, and puts them back among the others.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from deepspeed.ops.random_ltd import dropping_utils
from deepspeed.runtime.data_pipeline.data_routing.helper import convert_to_random_ltd
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer

from sctd_ds.method.plan import LayerPlan


@functools.cache
def unavailable() -> str | None:
    """Why random-LTD cannot run in this process, in a line; None: it can.

    The first call loads DeepSpeed's CUDA operators, which nvcc compiles if it has not yet.
    """
    try:
        dropping_utils.random_ltd_module = dropping_utils.RandomLTDBuilder().load(verbose=False)
    except Exception as error:  # every step of finding compilers and compiling raises a type of its own
        reason = str(error).strip() or type(error).__name__
        return f"random-LTD's CUDA operators: {reason.splitlines()[0][:160]}"
    return None


def settings(layers: int) -> dict[str, Any]:
    """The "data_efficiency" block that drops tokens in the layers where a drop step of ours runs on the kept ones."""
    plan = LayerPlan(layers)
    dropping = list(range(plan.cross, plan.last))
    random_ltd = {
        "enabled": True,
        # A "decoder" takes no mask, and rows are full here. An "encoder" would need one and cut it row by row: slower, for
        # the same samples and results.
        "model_type": "decoder",
        "model_mask_name": None,
        "hidden_state_order": "batch_seq_dim",
        "total_layer_num": layers,
        "random_ltd_layer_num": len(dropping),
        "random_ltd_layer_id": dropping,
        # A schedule at its end: `keep` sets the length, and no step changes it.
        "random_ltd_schedule": {
            "min_value": 1,
            "max_value": 1,
            "schedule_type": "fixed_linear",
            "schedule_config": {"require_steps": 1, "seq_per_step": 1},
        },
    }
    return {"enabled": True, "data_routing": {"enabled": True, "random_ltd": random_ltd}}


def wrap(engine: Any) -> nn.ModuleList:
    """The layers of the engine's BertForMaskedLM as random-LTD runs them, with the same parameters. The model is unchanged.

    engine: built with `settings` in its configuration.
    """
    encoder = engine.module.bert.encoder
    plain, encoder.layer = encoder.layer, nn.ModuleList(encoder.layer)
    convert_to_random_ltd(engine, BertLayer)
    wrapped, encoder.layer = encoder.layer, plain
    _, *names = inspect.signature(plain[0].forward).parameters

    def by_name(layer: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # The wrapper takes only the states by position, but transformers passes masks by position, too.
        return arguments[:1], {**dict(zip(names, arguments[1:], strict=False)), **keywords}

    for layer in wrapped:
        layer.register_forward_pre_hook(by_name, with_kwargs=True)
    return wrapped


def keep(engine: Any, tokens: int) -> None:
    """Let the dropping layers of the next steps see `tokens` tokens of each row."""
    engine.random_ltd_scheduler.set_current_seq(tokens)
