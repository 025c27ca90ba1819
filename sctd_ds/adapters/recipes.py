"""Models of well-known DeepSpeed recipes; their structure distinguishes them from classes of the same name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sctd_ds.adapters.base import Adapter, Batch, check_batch
from sctd_ds.adapters.huggingface import BertAdapter


class HelloDeepSpeedAdapter(BertAdapter):
    """HelloDeepSpeed's RobertaMLMModel: a RobertaModel named `encoder`; labels are padded with the pad id; returns the loss."""

    family = "HelloDeepSpeed"
    parts = (
        "encoder.embeddings.word_embeddings",
        "encoder.encoder.layer.0.attention.self.query",
        "encoder.encoder.layer.0.attention.output.LayerNorm",
        "lm_head.decoder",
    )

    def __init__(self, model: nn.Module) -> None:
        self._model, self._backbone = model, model.encoder
        self.layers = model.encoder.encoder.layer
        self.vocabulary = model.encoder.embeddings.word_embeddings.num_embeddings
        self.ignore_index = model.config.pad_token_id

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        given = {**dict(zip(("src_tokens", "attention_mask", "tgt_tokens"), args, strict=False)), **kwargs}
        batch = Batch(given.get("src_tokens"), given.get("tgt_tokens"), given.get("attention_mask"))
        return check_batch(batch, "tgt_tokens")

    def head(self, states: Tensor) -> Tensor:
        return self._model.lm_head(states)

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        return loss


class BingBertAdapter(Adapter):
    """bing_bert's BertForPreTrainingPreLN: forward takes one tuple, returns masked-LM plus next-sentence loss; pre-LN."""

    family = "bing_bert"
    parts = (
        "bert.embeddings.word_embeddings",
        "bert.encoder.layer.0.PreAttentionLayerNorm",
        "bert.encoder.FinalLayerNorm",
        "cls.predictions.decoder",
        "cls.seq_relationship",
    )
    ignore_index = -1
    items = ("type", "input_ids", "input_mask", "segment_ids", "next_sentence_label", "masked_lm_labels")

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.layers = model.bert.encoder.layer
        self.vocabulary = model.bert.embeddings.word_embeddings.weight.shape[0]

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        items = args[0] if args else kwargs.get("batch")
        if not isinstance(items, (tuple, list)) or len(items) < len(self.items):
            count = f"{len(items)} items" if isinstance(items, (tuple, list)) else type(items).__name__
            raise ValueError(f"the batch is {count}, expected one tuple of {', '.join(self.items)}")
        if kwargs.get("progressive_layer_drop") or kwargs.get("output_attentions"):
            raise ValueError("progressive_layer_drop and output_attentions are not supported with token dropping: drop them")
        given = dict(zip(self.items, items, strict=False))
        sentence_labels = given.get("next_sentence_label")
        if "next_sentence_label" in given and sentence_labels is None:
            raise ValueError("next_sentence_label is missing: this model's loss is masked-LM plus next-sentence loss")
        batch = Batch(
            given["input_ids"],
            given["masked_lm_labels"],
            given["input_mask"],
            {"token_type_ids": given["segment_ids"]},
            sentence_labels=sentence_labels,
        )
        return check_batch(batch, "masked_lm_labels")

    def embed(self, batch: Batch) -> Tensor:
        return self._model.bert.embeddings(batch.input_ids, batch.embedding["token_type_ids"])

    def layer(self, layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        if mask is None:
            additive = context.new_zeros(context.shape[0], 1, 1, context.shape[1])
        else:
            additive = (~mask).to(context.dtype) * -10000.0
        output = layer(context, additive)
        return output[0] if isinstance(output, tuple) else output

    def final_norm(self, states: Tensor) -> Tensor:
        return self._model.bert.encoder.FinalLayerNorm(states)

    def head(self, states: Tensor) -> Tensor:
        # The module's own forward takes all tokens, selects the labelled ones, and needs CUDA's profiler.
        predictions = self._model.cls.predictions
        return predictions.decoder(predictions.transform(states)) + predictions.bias

    def sentence_loss(self, first: Tensor, batch: Batch) -> Tensor | None:
        scores = self._model.cls.seq_relationship(self._model.bert.pooler(first))
        return F.cross_entropy(scores, batch.sentence_labels.view(-1), ignore_index=self.ignore_index)


class AcademicBudgetAdapter(BingBertAdapter):
    """academic-budget-bert's BertLMHeadModel, a masked LM: forward takes one tuple, returns `(loss,)`; pre- or post-LN."""

    family = "academic-budget-bert"
    parts = BingBertAdapter.parts[:-1]
    items = ("type", "input_ids", "input_mask", "segment_ids", "masked_lm_labels")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return super().matches(model) and hasattr(model.config, "encoder_ln_mode")

    def final_norm(self, states: Tensor) -> Tensor:
        config = self._model.config
        return super().final_norm(states) if config.encoder_ln_mode == "pre-ln" and config.useLN else states

    def head(self, states: Tensor) -> Tensor:
        # With sparse_mask_prediction the recipe never adds predictions.bias; otherwise it is the decoder's own bias.
        predictions = self._model.cls.predictions
        return predictions.decoder(predictions.transform(states))

    def sentence_loss(self, first: Tensor, batch: Batch) -> None:
        return None

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        return (loss,)


class MegatronAdapter(Adapter):
    """Megatron-DeepSpeed's BertModel: states are [s, b, h], mask True = masked, and the recipe reduces the loss itself.

    Its forward returns losses per token, and the recipe minimises their mean over the labelled tokens.
    `output` returns the objective as the loss of every labelled token, so this mean is the objective.
    """

    family = "Megatron-DeepSpeed BERT"
    parts = (
        "language_model.embedding.word_embeddings",
        "language_model.encoder.layers.0.self_attention",
        "lm_head.dense",
    )
    ignore_index = -1

    def __init__(self, model: nn.Module) -> None:
        language = model.language_model
        self._model, self._language = model, language
        self.layers = language.encoder.layers
        words = language.embedding.word_embeddings
        self.vocabulary = words.weight.shape[0]
        refused = {
            "sequence_parallel": getattr(model.config, "sequence_parallel", False),
            "tensor model parallelism": getattr(words, "num_embeddings", self.vocabulary) != self.vocabulary,
            "pipeline parallelism": not (getattr(model, "pre_process", True) and getattr(model, "post_process", True)),
            "rotary positions": getattr(language, "use_rotary_position_embeddings", False),
            "mixture of experts": any(hasattr(module, "deepspeed_moe") for module in self.layers.modules()),
        }
        found = [name for name, used in refused.items() if used]
        if found:
            raise ValueError(f"Megatron's {', '.join(found)}: not supported with token dropping; switch it off")

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        names = ("bert_model_input", "attention_mask", "tokentype_ids", "lm_labels")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        batch = Batch(
            given.get("bert_model_input"),
            given.get("lm_labels"),
            given.get("attention_mask"),
            {"tokentype_ids": given.get("tokentype_ids")},
        )
        return check_batch(batch, "lm_labels")

    def embed(self, batch: Batch) -> Tensor:
        ids = batch.input_ids
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self._language.embedding(ids, positions, **batch.embedding).transpose(0, 1)

    def layer(self, layer: nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None, *places: Tensor | None) -> Tensor:
        rows, tokens = context.shape[:2]
        if mask is None:
            masked = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool, device=context.device)
        else:
            masked = ~(mask & mask.transpose(2, 3))
        output = layer(context.transpose(0, 1), masked)
        return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)

    def final_norm(self, states: Tensor) -> Tensor:
        norm = getattr(self._language.encoder, "final_layernorm", None)
        return states if norm is None else norm(states)

    def head(self, states: Tensor) -> Tensor:
        return self._model.lm_head(states, self._model.shared_embedding_or_output_weight())

    def output(self, loss: Tensor, batch: Batch, first: Tensor) -> Any:
        token_losses = torch.where(batch.labels == self.ignore_index, 0.0, loss)
        sentence = None
        if getattr(self._model, "binary_head", None) is not None:
            sentence = self._model.binary_head(self._language.pooler(first.transpose(0, 1)))
        return token_losses, sentence, (token_losses, sentence)
