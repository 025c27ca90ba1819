"""What the method needs of a model family, and the checks that every family shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass
class Batch:
    """A training micro-batch. input_ids, labels: [B, S]; attention_mask: [B, S], 1 = real token, or None when rows are full."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    embedding: dict[str, Any] = field(default_factory=dict)
    """Further inputs of the embedding, for example token_type_ids."""
    return_dict: bool = True
    sentence_labels: Tensor | None = None
    """[B] labels of the sentence-level loss, where the model has one."""
    items: Tensor | int | None = None
    """Labelled tokens of the whole optimizer step, where the caller wants the loss divided by these (the Trainer does)."""


class Adapter(ABC):
    """One model family: names the parts of a model and runs them. It owns no parameter and changes nothing in the model.

    To support another family, derive a class from this one (or from the nearest family), and register it with
    `sctd_ds.register_adapter`. `__init__` gets the model and sets `layers` and `vocabulary`.

    Legend: B rows, S tokens, Q queries, C context tokens, d hidden size, V vocabulary.
    """

    family: ClassVar[str]
    """What to call the family in messages."""
    parts: ClassVar[tuple[str, ...]]
    """Dotted names of submodules by which a model is recognised."""
    black_box: ClassVar[bool] = True
    """`layer` runs the module's own forward, which cannot tell queries from context: it is given the same tokens as both,
    and where the kept tokens attend to all tokens, all are run and the kept ones taken. False saves the rest of that layer."""
    positional: ClassVar[bool] = False
    """`layer` depends on where its tokens stand; it then gets two more arguments, see there."""

    layers: Sequence[nn.Module]
    vocabulary: int
    ignore_index: int = -100
    """The label where nothing is predicted."""

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is of this family."""
        return not missing_parts(model, cls.parts)

    @abstractmethod
    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The micro-batch in the arguments of the model's forward; ValueError for what cannot be trained on."""

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """[B, S] ids -> [B, S, d] states before the first layer."""

    @abstractmethod
    def layer(self, layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        """One encoder layer: queries [B, Q, d] attend to context [B, C, d]; mask [B, 1, 1, C], True = attend.

        places, where `positional`: the positions of the queries [B, Q] and of the context [B, C]; None for 0, 1, 2 ...
        """

    def final_norm(self, states: Tensor) -> Tensor:
        """What a pre-LN encoder does to its last states, [..., d] -> [..., d]. The heads and the KL see its output."""
        return states

    @abstractmethod
    def head(self, states: Tensor) -> Tensor:
        """[..., d] finished states of the last layer -> [..., V] logits.

        On a GPU the backward pass writes their gradient over them, so the last operation must not save its own output, as
        a linear layer or an addition does not and tanh does; torch refuses such a backward pass.
        """

    def sentence_loss(self, first: Tensor, batch: Batch) -> Tensor | None:
        """Loss beside the masked-LM loss (next sentence prediction), from the finished states of the first token [B, 1, d]."""
        return None

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        """The model's own return type around the loss. first: [B, 1, d], the finished states of the first token."""
        return loss


def missing_parts(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Those of the dotted submodule names that `model` does not have."""

    def has(name: str) -> bool:
        try:
            model.get_submodule(name)
        except AttributeError:
            return False
        return True

    return [name for name in parts if not has(name)]


def check_batch(batch: Batch, where: str = "labels") -> Batch:
    """`batch` as it is, or ValueError for what token dropping cannot work with. where: the recipe's name for the labels."""
    if batch.input_ids is None:
        raise ValueError("input_ids is missing: token dropping looks importance up by token id")
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
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected that of input_ids {shape}{hint}")
    return batch
