"""The interface between the method and a model family, and the checks that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass
class Batch:
    """A training micro-batch. input_ids, labels: [B, S]; attention_mask: [B, S], 1 = real token, or None: no padding."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    embedding: dict[str, Any] = field(default_factory=dict)
    """Other inputs of the embedding, for example token_type_ids."""
    return_dict: bool = True
    sentence_labels: Tensor | None = None
    """[B] labels of the sentence-level loss, if the model has one."""
    items: Tensor | int | None = None
    """Labelled tokens of the whole optimizer step, if the caller divides the loss by these (the Trainer does)."""


class Adapter(ABC):
    """One model family: finds the parts of a model and runs them. It owns no parameter and does not change the model.

    To support another family, derive a class from this one (or from the nearest family), and register it with
    `sctd_ds.register_adapter`. `__init__` takes the model and sets `layers` and `vocabulary`.

    Legend: B rows, S tokens, Q queries, C context tokens, d hidden size, V vocabulary.
    """

    family: ClassVar[str]
    """The family's name in messages."""
    parts: ClassVar[tuple[str, ...]]
    """Dotted names of the submodules that identify a model of the family."""
    black_box: ClassVar[bool] = True
    """True: `layer` runs the module's own forward, which cannot separate queries from context, so it receives the same
    tokens as both; the cross layer runs on all tokens and then selects the kept ones. False saves that extra work."""
    positional: ClassVar[bool] = False
    """Whether `layer` depends on its tokens' positions; if so, it receives them as two more arguments."""

    layers: Sequence[nn.Module]
    vocabulary: int
    ignore_index: int = -100
    """The label of a token that is not predicted."""

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` belongs to this family."""
        return not missing_parts(model, cls.parts)

    @abstractmethod
    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The micro-batch in the arguments of the model's forward. Raises ValueError for unusable arguments."""

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """[B, S] ids -> [B, S, d] states before the first layer."""

    @abstractmethod
    def layer(self, layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        """One encoder layer: queries [B, Q, d] attend to context [B, C, d]; mask [B, 1, 1, C], True = attend.

        places, if `positional`: positions of the queries [B, Q] and of the context [B, C]; None means 0, 1, 2 ...
        """

    def final_norm(self, states: Tensor) -> Tensor:
        """A pre-LN encoder's final norm, [..., d] -> [..., d]. The heads and the KL read its output."""
        return states

    @abstractmethod
    def head(self, states: Tensor) -> Tensor:
        """[..., d] final states (after `final_norm`) -> [..., V] logits.

        On a GPU the backward pass writes their gradient over them, so the last operation must not save its own output, as
        a linear layer or an addition does not and tanh does; torch refuses such a backward pass.
        """

    def sentence_loss(self, first: Tensor, batch: Batch) -> Tensor | None:
        """A second loss (next sentence prediction) from the first token's final states [B, 1, d]; None: there is none."""
        return None

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        """The loss in the model's own return type. first: [B, 1, d], the first token's final states."""
        return loss


def missing_parts(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """The dotted submodule names that `model` lacks."""

    def has(name: str) -> bool:
        try:
            model.get_submodule(name)
        except AttributeError:
            return False
        return True

    return [name for name in parts if not has(name)]


def check_batch(batch: Batch, where: str = "labels") -> Batch:
    """`batch` itself. Raises ValueError if token dropping cannot use it. where: the recipe's name for the labels."""
    if batch.input_ids is None:
        raise ValueError("input_ids is missing: token dropping looks up importance by token id; pass input_ids")
    if batch.labels is None:
        raise ValueError(
            f"{where} are missing: a converted model computes its masked-LM loss inside its training forward; "
            f"pass {where}, or call model.eval() for plain outputs"
        )
    shape = tuple(batch.input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids has shape {shape}, expected [rows, tokens]")
    for name, value in (("attention_mask", batch.attention_mask), (where, batch.labels)):
        if value is not None and tuple(value.shape) != shape:
            hint = ": pass the plain padding mask, 1 = real token" if name == "attention_mask" else ""
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}, the shape of input_ids{hint}")
    return batch
