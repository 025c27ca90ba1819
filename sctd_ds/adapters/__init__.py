"""How the method reaches into a model: one small class per family, in one table, chosen by the model's structure."""

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

# The first that matches is taken, so a family stands before those whose parts it has and exceeds.
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
    """Support another model family; it is asked before those already known. Returns the class, so it can decorate it."""
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise ValueError(f"{adapter!r} is not a subclass of sctd_ds.Adapter: derive it from there and define what is abstract")
    if adapter not in ADAPTERS:
        ADAPTERS.insert(0, adapter)
    return adapter


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the first family whose parts `model` has; ValueError naming what was looked for otherwise."""
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
        f"{type(model).__name__} is not a model that sctd_ds can convert. Known families: "
        f"{', '.join(adapter.family for adapter in ADAPTERS)}. The nearest is {nearest.family}, but the model {why}. "
        "For another family derive a class from sctd_ds.Adapter and pass it to sctd_ds.register_adapter, see docs/recipes.md"
    )
