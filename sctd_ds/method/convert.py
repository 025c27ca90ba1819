"""Teach a model token dropping, in place, and undo it."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from sctd_ds.config import ScTDConfig
from sctd_ds.method import objective, passes
from sctd_ds.method.schedule import MODES, Mode
from sctd_ds.method.selection import Importance
from sctd_ds.method.state import ScTD, check_trainable

_STATE = "_sctd"
_FORWARD = "sctd_training_forward"


def convert(model: Any, config: ScTDConfig | None = None) -> Any:
    """Teach `model` token dropping, in place: same object, parameters and state_dict keys.

    Training forwards (which need labels) then return the method's objective as their loss; `model.eval()` is the untouched
    model. Converting again replaces the configuration and keeps the importance table. Raises ValueError for a model
    family without an adapter, with fewer than four layers, or whose encoder is frozen.
    """
    state = ScTD(model, config or ScTDConfig())
    previous: ScTD | None = getattr(model, _STATE, None)
    if previous is None and "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__}.forward was replaced on this object: convert the model before anything wraps it"
        )
    if previous is not None and type(previous.importance) is type(state.importance):
        state.importance.to(previous.importance.scores.device)
        state.importance.load_state_dict(previous.importance.state_dict())
    setattr(model, _STATE, state)
    if previous is not None:  # its forward looks the state up; whoever wrapped that forward since keeps the wrapping
        return model
    original = type(model).forward

    # A bound method, and no closure over `model`: a deep copy of the model is converted by itself.
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return original(self, *args, **kwargs)
        state = state_of(self)
        check_trainable(state.adapter)
        batch = state.read(args, kwargs)
        result = objective.compute(state, passes.run(state, batch, state.mode, state.step))
        state.parts = result.parts
        return state.adapter.output(result.loss, batch, result.first)

    # Pickle stores a bound method by name and would silently bring the class's own forward back; this name fails aloud.
    forward.__name__ = _FORWARD
    model.forward = types.MethodType(forward, model)
    return model


def is_converted(model: Any) -> bool:
    """Whether `model` (or the model of an engine) is converted."""
    return _find_state(model) is not None


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: the model trains as it did before, and the importance table is gone.

    Raises ValueError for a model that is not converted, that an engine of ours drives, or whose forward was wrapped since.
    """
    if hasattr(model, "_take_model_step"):
        raise ValueError(f"{type(model).__name__} needs the method to step: build a new engine around sctd_ds.revert(model)")
    state_of(model)
    if getattr(vars(model)["forward"], "__name__", None) != _FORWARD:
        raise ValueError(f"{type(model).__name__}.forward was wrapped since the conversion: revert what wrapped it first")
    del model.forward
    delattr(model, _STATE)
    return model


def state_of(model: Any) -> ScTD:
    """The method's state of a converted model (or of an engine around one). Raises ValueError where it is not converted."""
    state = _find_state(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not converted: call sctd_ds.convert(model, config) first")
    return state


def set_mode(model: nn.Module, mode: Mode, step: int | None = None) -> None:
    """What the next training forwards do: "dense", "drop" or "align". The engine sets it by itself.

    step: the optimizer step being computed (1-based), which align_schedule="spread" needs to choose rows; without it
    every row is aligned.
    """
    if mode not in MODES:
        raise ValueError(f'mode="{mode}": expected one of {", ".join(MODES)}')
    state = state_of(model)
    if mode != "dense" and not state.plan.drops:
        raise ValueError(f'mode="{mode}" needs a method that drops tokens; the model was converted with method="dense"')
    state.mode, state.step = mode, step


def importance(model: nn.Module) -> Importance:
    """The importance policy of a converted model; `.scores` is its [V] fp32 table, writable."""
    return state_of(model).importance


def _find_state(model: Any) -> ScTD | None:
    return getattr(model, _STATE, None) or getattr(getattr(model, "module", None), _STATE, None)
