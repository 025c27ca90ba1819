"""Token dropping with semantic-consistent learning (ScTD) for BERT pretraining on DeepSpeed."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sctd_ds.adapters import Adapter, Batch, register_adapter
from sctd_ds.config import ConfigError, ScTDConfig
from sctd_ds.method import convert as _method
from sctd_ds.method.convert import importance, revert, set_mode

if TYPE_CHECKING:
    from sctd_ds.engine.data_parallel import ScTDEngine
    from sctd_ds.engine.initialize import initialize
    from sctd_ds.engine.pipeline import Pipeline, ScTDPipelineEngine
    from sctd_ds.integrations.callback import ScTDCallback, StepClock
    from sctd_ds.integrations.export import export

try:
    __version__ = version("sctd_ds")
except PackageNotFoundError:  # run from a checkout that is on the path but not installed
    __version__ = "0+unknown"

__all__ = [
    "Adapter",
    "Batch",
    "ConfigError",
    "Pipeline",
    "ScTDCallback",
    "ScTDConfig",
    "ScTDEngine",
    "ScTDPipelineEngine",
    "StepClock",
    "convert",
    "export",
    "importance",
    "initialize",
    "register_adapter",
    "revert",
    "set_mode",
]

_LAZY = {
    "initialize": "engine.initialize",
    "ScTDEngine": "engine.data_parallel",
    "Pipeline": "engine.pipeline",
    "ScTDPipelineEngine": "engine.pipeline",
    "export": "integrations.export",
    "ScTDCallback": "integrations.callback",
    "StepClock": "integrations.callback",
}


def convert(model: Any, config: ScTDConfig | None = None) -> Any:
    """Teach `model`, or the model of a DeepSpeed engine, token dropping in place: same object, parameters, state_dict keys.

    Training forwards (which need labels) then return the method's objective as their loss; `model.eval()` is the untouched
    model. An engine also gets the method's schedule and checkpoints. Converting again replaces the configuration and keeps
    the importance table. Raises ValueError for a model family without an adapter, with fewer than four layers, or whose
    encoder is frozen.
    """
    if not hasattr(model, "_take_model_step"):
        return _method.convert(model, config)
    from sctd_ds.engine.initialize import attach

    _method.convert(model.module, config)
    return attach(model)


def __getattr__(name: str) -> Any:
    """Import DeepSpeed and transformers only when they are used: `convert` and `set_mode` do without."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"sctd_ds.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'sctd_ds' has no attribute {name!r}")
