"""The method's access to a model: one small class per model family, in one table, chosen by the model's structure."""

from __future__ import annotations

from torch import nn

from sctd_ds.adapters.base import Adapter, Batch, missing_parts
from sctd_ds.adapters.huggingface import (
    BertAdapter,
    BertPreTrainingAdapter,
    DistilBertAdapter,
    ElectraAdapter,
    ModernBertAdapter,
    RobertaAdapter,
)
from sctd_ds.adapters.recipes import AcademicBudgetAdapter, BingBertAdapter, HelloDeepSpeedAdapter, MegatronAdapter

__all__ = ["ADAPTERS", "Adapter", "Batch", "find_adapter", "register_adapter"]

# The first match wins, so a family comes before those whose parts are a subset of its own.
ADAPTERS: list[type[Adapter]] = [
    BertPreTrainingAdapter,
    BertAdapter,
    RobertaAdapter,
    ElectraAdapter,
    DistilBertAdapter,
    ModernBertAdapter,
    HelloDeepSpeedAdapter,
    BingBertAdapter,
    AcademicBudgetAdapter,
    MegatronAdapter,
]


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Add a model family, which takes precedence over the known ones. Returns the class, so this works as a decorator."""
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise ValueError(f"{adapter!r} is not a subclass of sctd_ds.Adapter: derive it and define the abstract methods")
    if adapter not in ADAPTERS:
        ADAPTERS.insert(0, adapter)
    return adapter


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the first family that matches `model`. Raises ValueError, naming the missing parts, if none does."""
    if not isinstance(model, nn.Module):
        inner = " (its .network is one)" if isinstance(getattr(model, "network", None), nn.Module) else ""
        raise ValueError(f"expected a torch.nn.Module, found {type(model).__name__}{inner}")
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter(model)
    if any(type(module).__name__ == "DeepSpeedTransformerLayer" for module in model.modules()):
        raise ValueError(
            "DeepSpeedTransformerLayer keeps state per layer and cannot run a layer twice before the backward pass: "
            "train without --deepspeed_transformer_kernel"
        )
    nearest = min(ADAPTERS, key=lambda adapter: len(missing_parts(model, adapter.parts)) / len(adapter.parts))
    missing = missing_parts(model, nearest.parts)
    why = f"lacks {', '.join(missing)}" if missing else "is a decoder, or has further heads"
    raise ValueError(
        f"sctd_ds cannot convert {type(model).__name__}. Known families: "
        f"{', '.join(adapter.family for adapter in ADAPTERS)}. The nearest is {nearest.family}, but the model {why}. "
        "For another family, derive a class from sctd_ds.Adapter and pass it to sctd_ds.register_adapter, see docs/recipes.md"
    )
