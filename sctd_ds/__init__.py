"""Token dropping with semantic-consistent learning (ScTD) for BERT pretraining on DeepSpeed."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sctd_ds.adapters import Adapter, Batch, register_adapter
from sctd_ds.config import ConfigError, ScTDConfig
from sctd_ds.encoder import convert, importance, revert, set_mode

if TYPE_CHECKING:
    from sctd_ds.engine import ScTDEngine, initialize
    from sctd_ds.huggingface import export
    from sctd_ds.pipeline import Pipeline, ScTDPipelineEngine
    from sctd_ds.trainer import ScTDCallback, StepClock

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
    "initialize": "engine",
    "ScTDEngine": "engine",
    "export": "huggingface",
    "Pipeline": "pipeline",
    "ScTDPipelineEngine": "pipeline",
    "ScTDCallback": "trainer",
    "StepClock": "trainer",
}


def __getattr__(name: str) -> Any:
    """Import DeepSpeed and transformers only when they are used: `convert` and `set_mode` do without."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"sctd_ds.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'sctd_ds' has no attribute {name!r}")
