"""How the method reaches into a model family: one small class each, in one table.

An adapter names a model's parts and runs one of its layers on chosen queries and context; it owns no parameter. To support
another family, write a class with the members of `Adapter` and add it to `ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
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


class Adapter(Protocol):
    """What the encoder and the objective need of a model."""

    layers: Sequence[nn.Module]
    ignore_index: int
    vocabulary: int

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The micro-batch in the arguments of the model's forward; ValueError for what cannot be trained on."""

    def embed(self, batch: Batch) -> Tensor:
        """[B, S] ids -> [B, S, d] states before the first layer."""

    def layer(self, layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """One encoder layer: queries [B, Q, d] attend to context [B, C, d]; mask [B, 1, 1, C], True = attend."""

    def head(self, states: Tensor) -> Tensor:
        """[..., d] states of the last layer -> [..., V] logits."""

    def output(self, loss: Tensor, batch: Batch) -> Any:
        """The model's own return type around the loss."""


class BertAdapter:
    """Hugging Face BertForMaskedLM. Attention always runs through torch's scaled_dot_product_attention."""

    ignore_index = -100

    def __init__(self, model: nn.Module) -> None:
        self._bert, self._cls = model.bert, model.cls
        self._returns_dict = getattr(model.config, "return_dict", True)
        self.layers = model.bert.encoder.layer
        self.vocabulary = model.bert.embeddings.word_embeddings.num_embeddings

    @staticmethod
    def matches(model: nn.Module) -> bool:
        """Whether `model` has the parts by name: bert.embeddings, bert.encoder.layer, cls.predictions and no NSP head."""
        try:
            predictions, layers = model.cls.predictions, model.bert.encoder.layer
            model.bert.embeddings.word_embeddings.num_embeddings  # noqa: B018
        except AttributeError:
            return False
        plain = not getattr(model.config, "is_decoder", False) and not hasattr(model.cls, "seq_relationship")
        return plain and hasattr(predictions, "decoder") and hasattr(layers[0].attention.self, "query")

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names):
            raise ValueError(f"pass {', '.join(names)} by position at most; labels by name")
        if given.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds cannot be trained on with token dropping: importance is looked up by token id; pass input_ids"
            )
        if given.get("input_ids") is None:
            raise ValueError("input_ids is missing: token dropping looks importance up by token id")
        if given.get("labels") is None:
            raise ValueError(
                "labels are missing: a converted model computes its masked-LM loss inside its training forward; "
                "pass labels (-100 where nothing is predicted), or call model.eval() for plain outputs"
            )
        unused = [k for k in ("encoder_hidden_states", "encoder_attention_mask") if given.get(k) is not None]
        unused += [k for k in ("output_hidden_states", "output_attentions") if given.get(k)]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: not available in a training forward with token dropping; use model.eval()"
            )
        mask = given.get("attention_mask")
        if mask is not None and mask.shape != given["input_ids"].shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected that of input_ids {tuple(given['input_ids'].shape)}: "
                "pass the plain padding mask, 1 = real token"
            )
        if given["labels"].shape != given["input_ids"].shape:
            raise ValueError(
                f"labels has shape {tuple(given['labels'].shape)}, expected that of input_ids {tuple(given['input_ids'].shape)}"
            )
        embedding = {k: given[k] for k in ("token_type_ids", "position_ids") if given.get(k) is not None}
        return_dict = given.get("return_dict")
        return_dict = self._returns_dict if return_dict is None else return_dict
        return Batch(given["input_ids"], given["labels"], mask, embedding, return_dict)

    def embed(self, batch: Batch) -> Tensor:
        return self._bert.embeddings(input_ids=batch.input_ids, **batch.embedding)

    @staticmethod
    def layer(layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        attention = layer.attention.self

        def heads(x: Tensor) -> Tensor:  # [B, T, d] -> [B, heads, T, d / heads]
            return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(attention.query(queries)),
            heads(attention.key(context)),
            heads(attention.value(context)),
            attn_mask=mask,
            dropout_p=attention.dropout.p if attention.training else 0.0,
        )
        attended = layer.attention.output(mixed.transpose(1, 2).flatten(2), queries)
        return layer.output(layer.intermediate(attended), attended)

    def head(self, states: Tensor) -> Tensor:
        return self._cls(states)

    def output(self, loss: Tensor, batch: Batch) -> Any:
        from transformers.modeling_outputs import MaskedLMOutput

        return MaskedLMOutput(loss=loss) if batch.return_dict else (loss,)


ADAPTERS: list[type] = [BertAdapter]


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter whose structure `model` has; ValueError naming what is supported otherwise."""
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter(model)
    names = ", ".join(adapter.__name__.removesuffix("Adapter") for adapter in ADAPTERS)
    raise ValueError(
        f"{type(model).__name__} is not a model that sctd_ds can convert. Supported: {names} (Hugging Face BertForMaskedLM: "
        "bert.embeddings, bert.encoder.layer, cls.predictions). Other families need an adapter, see sctd_ds/adapters.py"
    )
