"""Model families of Hugging Face transformers. Their attention always runs through `attention.attend`."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import sctd_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctd_ds.adapters.attention import attend
from sctd_ds.adapters.base import Adapter, Batch, check_batch


class HuggingFaceAdapter(Adapter):
    """Base: forward takes keywords, with label -100 where nothing is predicted, and returns MaskedLMOutput or a tuple."""

    black_box = False
    embedding_inputs: ClassVar[tuple[str, ...]] = ("token_type_ids", "position_ids")

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature = inspect.signature(type(model).forward)
        self._returns_dict = getattr(model.config, "return_dict", True)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        # A causal model has the same parts, but predicts the next token; its forward accepts a key-value cache.
        causal = "past_key_values" in inspect.signature(type(model).forward).parameters
        return super().matches(model) and not causal and not getattr(model.config, "is_decoder", False)

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        given = dict(self._signature.bind(self._model, *args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        given.pop("self", None)
        if given.pop("inputs_embeds", None) is not None:
            raise ValueError(
                "inputs_embeds does not work with token dropping, which looks up importance by token id: pass input_ids"
            )
        return_dict = given.pop("return_dict", None)
        batch = Batch(
            given.pop("input_ids", None),
            given.pop("labels", None),
            given.pop("attention_mask", None),
            {name: value for name in self.embedding_inputs if (value := given.pop(name, None)) is not None},
            self._returns_dict if return_dict is None else return_dict,
            given.pop("next_sentence_label", None),
            given.pop("num_items_in_batch", None),
        )
        unused = [name for name, value in given.items() if value is not None and value is not False]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: not supported in a training forward with token dropping; drop it, or call model.eval()"
            )
        return check_batch(batch, "labels")

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        from transformers.modeling_outputs import MaskedLMOutput

        return MaskedLMOutput(loss=loss) if batch.return_dict else (loss,)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, dropout: float) -> Tensor:
    """Multi-head attention: query [B, Q, d], key and value [B, C, d], mask [B, 1, 1, C] -> [B, Q, d]."""

    def split(x: Tensor) -> Tensor:  # [B, T, d] -> [B, heads, T, d / heads]
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    mixed = attend(split(query), split(key), split(value), mask, dropout)
    return mixed.transpose(1, 2).flatten(2)


class BertAdapter(HuggingFaceAdapter):
    """BertForMaskedLM; also the base of other families with BERT's layers."""

    family = "BERT"
    parts = (
        "bert.embeddings.word_embeddings",
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "cls.predictions.decoder",
    )
    one_pass_backward: ClassVar[bool] = False
    """Run GELU and LayerNorm through sctd_kernels' `linear_gelu` and `layer_norm`. A class variable of BertAdapter, for all
    families with BERT's layers; set it before the first step. Off until a GPU has shown that it is faster."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._backbone = model.get_submodule(self.parts[0].split(".")[0])
        self.layers = self._backbone.encoder.layer

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return super().matches(model) and (cls is not BertAdapter or not hasattr(model.cls, "seq_relationship"))

    def embed(self, batch: Batch) -> Tensor:
        return self._backbone.embeddings(input_ids=batch.input_ids, **batch.embedding)

    @staticmethod
    def layer(layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        attention = layer.attention.self
        mixed = _attention(
            attention.query(queries),
            attention.key(context),
            attention.value(context),
            mask,
            heads=attention.num_attention_heads,
            dropout=attention.dropout.p if attention.training else 0.0,
        )
        attended = _add_and_norm(layer.attention.output, mixed, queries)
        return _add_and_norm(layer.output, _widen(layer.intermediate, attended), attended)

    def head(self, states: Tensor) -> Tensor:
        return self._model.cls.predictions(states)


def _widen(part: nn.Module, states: Tensor) -> Tensor:
    """BertIntermediate: the feed-forward block's first product and its activation."""
    gelu = getattr(part.intermediate_act_fn, "act", None) is F.gelu
    if BertAdapter.one_pass_backward and gelu and type(part.dense) is nn.Linear:
        return sctd_kernels.linear_gelu(states, part.dense.weight, part.dense.bias)
    return part(states)


def _add_and_norm(part: nn.Module, states: Tensor, residual: Tensor) -> Tensor:
    """BertSelfOutput and BertOutput: product, dropout, sum and LayerNorm."""
    norm = part.LayerNorm
    if BertAdapter.one_pass_backward and type(norm) is nn.LayerNorm:
        added = part.dropout(part.dense(states)) + residual
        return sctd_kernels.layer_norm(added, norm.weight, norm.bias, norm.eps)
    return part(states, residual)


class BertPreTrainingAdapter(BertAdapter):
    """BertForPreTraining: the sum of the masked-LM and the next-sentence loss, as in the model itself."""

    family = "BERT with next sentence prediction"
    parts = (*BertAdapter.parts, "cls.seq_relationship", "bert.pooler")

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        batch = super().batch(args, kwargs)
        if batch.sentence_labels is None:
            raise ValueError(
                "next_sentence_label is missing: BertForPreTraining computes a loss only if it gets both labels and "
                "next_sentence_label; pass it, or use BertForMaskedLM"
            )
        return batch

    def sentence_loss(self, first: Tensor, batch: Batch) -> Tensor:
        scores = self._model.cls.seq_relationship(self._model.bert.pooler(first))
        return F.cross_entropy(scores, batch.sentence_labels.view(-1))

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

        return BertForPreTrainingOutput(loss=loss) if batch.return_dict else (loss,)


class RobertaAdapter(BertAdapter):
    """RobertaForMaskedLM, XLMRobertaForMaskedLM and CamembertForMaskedLM, which share one structure."""

    family = "RoBERTa"
    parts = (
        "roberta.embeddings.word_embeddings",
        "roberta.encoder.layer.0.attention.self.query",
        "roberta.encoder.layer.0.attention.output.LayerNorm",
        "lm_head.decoder",
    )

    def head(self, states: Tensor) -> Tensor:
        return self._model.lm_head(states)


class ElectraAdapter(BertAdapter):
    """ElectraForMaskedLM, the generator. The discriminator predicts at every token, so it has no tokens to drop."""

    family = "ELECTRA generator"
    parts = (
        "electra.embeddings.word_embeddings",
        "electra.encoder.layer.0.attention.self.query",
        "electra.encoder.layer.0.attention.output.LayerNorm",
        "generator_predictions",
        "generator_lm_head",
    )

    def embed(self, batch: Batch) -> Tensor:
        states = super().embed(batch)
        project = getattr(self._backbone, "embeddings_project", None)  # absent if embedding and hidden size are equal
        return states if project is None else project(states)

    def head(self, states: Tensor) -> Tensor:
        return self._model.generator_lm_head(self._model.generator_predictions(states))


class DistilBertAdapter(HuggingFaceAdapter):
    """DistilBertForMaskedLM. The released model has six layers: 1-2 full, 3 cross, 4-5 kept, 6 full."""

    family = "DistilBERT"
    parts = ("distilbert.embeddings.word_embeddings", "distilbert.transformer.layer.0.attention.q_lin", "vocab_projector")
    embedding_inputs = ("position_ids",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = model.distilbert.transformer.layer

    def embed(self, batch: Batch) -> Tensor:
        return self._model.distilbert.embeddings(batch.input_ids, **batch.embedding)

    @staticmethod
    def layer(layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        attention = layer.attention
        mixed = _attention(
            attention.q_lin(queries),
            attention.k_lin(context),
            attention.v_lin(context),
            mask,
            heads=attention.n_heads,
            dropout=attention.dropout.p if attention.training else 0.0,
        )
        attended = layer.sa_layer_norm(attention.out_lin(mixed) + queries)
        return layer.output_layer_norm(layer.ffn(attended) + attended)

    def head(self, states: Tensor) -> Tensor:
        model = self._model
        return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(states))))


class ModernBertAdapter(HuggingFaceAdapter):
    """ModernBertForMaskedLM: pre-LN, rotary positions, local attention in most layers.

    Kept tokens retain their positions in the row, so rotation and the local window are those of the whole sequence.
    """

    family = "ModernBERT"
    parts = ("model.embeddings.tok_embeddings", "model.layers.0.attn.Wqkv", "model.rotary_emb", "model.final_norm", "decoder")
    positional = True
    embedding_inputs = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = model.model.layers
        self.ignore_index = model.config.sparse_pred_ignore_index if model.config.sparse_prediction else -100

    def embed(self, batch: Batch) -> Tensor:
        return self._model.model.embeddings(input_ids=batch.input_ids)

    def layer(self, layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        attention, width = layer.attn, queries.shape[-1]
        query_at, context_at = (
            torch.arange(x.shape[1], device=x.device)[None] if at is None else at
            for x, at in zip((queries, context), places, strict=True)
        )
        weight, bias = attention.Wqkv.weight, attention.Wqkv.bias

        def project(x: Tensor, rows: slice) -> Tensor:  # by these rows of Wqkv: [B, T, d] -> [B, n * heads, T, d / heads]
            part = F.linear(layer.attn_norm(x), weight[rows], None if bias is None else bias[rows])
            return part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        query = project(queries, slice(width))
        key, value = project(context, slice(width, None)).chunk(2, dim=1)
        if layer.attention_type == "sliding_attention":
            distance = (query_at[:, None, :, None] - context_at[:, None, None, :]).abs()  # [B or 1, 1, Q, C]
            near = distance <= self._model.config.sliding_window
            # Padding far from any token attends to itself: what nothing reads must not be NaN.
            mask = near if mask is None else near & (mask | (distance == 0))
        mixed = attend(
            self._rotate(query, query_at, layer.attention_type),
            self._rotate(key, context_at, layer.attention_type),
            value,
            mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
        )
        states = queries + attention.out_drop(attention.Wo(mixed.transpose(1, 2).flatten(2)))
        return states + layer.mlp(layer.mlp_norm(states))

    def _rotate(self, x: Tensor, at: Tensor, attention_type: str) -> Tensor:
        """Rotary positions, at least in fp32. x: [B, heads, T, D]; at: [B or 1, T]."""
        cos, sin = (part[:, None] for part in self._model.model.rotary_emb(x, at, attention_type))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    def final_norm(self, states: Tensor) -> Tensor:
        return self._model.model.final_norm(states)

    def head(self, states: Tensor) -> Tensor:
        return self._model.decoder(self._model.head(states))
