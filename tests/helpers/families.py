"""Every supported family at toy size: how to build it, call it, and walk through it layer by layer in plain code."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    CamembertConfig,
    CamembertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from helpers import recipe_models

PAD, UNK, CLS, SEP, MASK = range(5)
KEPT_IDS = [UNK, CLS, SEP, MASK]
VOCABULARY, WIDTH, LENGTH, LAYERS = 61, 32, 17, 6
BERT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Rows:
    """A micro-batch without any family's conventions. labels: -100 where nothing is predicted; real: tokens of each row."""

    ids: Tensor
    labels: Tensor
    types: Tensor
    sentence: Tensor
    real: tuple[int, ...]

    @property
    def mask(self) -> Tensor:
        counts = torch.tensor(self.real, device=self.ids.device)
        return (torch.arange(self.ids.shape[1], device=self.ids.device)[None] < counts[:, None]).long()


def rows(real: tuple[int, ...] = (17, 9, 13), seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (len(real), LENGTH), generator=generator)
    labels = torch.full_like(ids, -100)
    ids[:, 0] = CLS
    for row, count in enumerate(real):
        ids[row, count - 1], ids[row, count:] = SEP, PAD
        chosen = 1 + torch.randperm(count - 2, generator=generator)[: 2 + row]
        labels[row, chosen] = ids[row, chosen]
        ids[row, chosen[:-1]] = MASK
    types = (torch.arange(LENGTH) >= 5 + torch.arange(len(real))[:, None]).long()
    return Rows(ids, labels, types, torch.arange(len(real)) % 2, real)


class Family(ABC):
    """One model in plain code. `x` is [1, n, d], the states of the tokens at `positions` of one sequence."""

    name: str
    ignore_index = -100
    tolerance = 1e-9
    hugging_face = True
    has_types = True
    returns: type = MaskedLMOutput

    @abstractmethod
    def build(self, **config: Any) -> nn.Module: ...

    def arguments(self, batch: Rows) -> tuple[tuple, dict]:
        types = {"token_type_ids": batch.types} if self.has_types else {}
        return (), {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels, **types}

    def labels(self, batch: Rows) -> Tensor:
        return torch.where(batch.labels == -100, self.ignore_index, batch.labels)

    def loss(self, output: Any, batch: Rows) -> Tensor:
        """What the recipe's loop calls backward on."""
        return output.loss

    def eval_outputs(self, output: Any) -> list[Tensor]:
        return list(output.values())

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList: ...

    @abstractmethod
    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor: ...

    def layer(self, model: nn.Module, index: int, x: Tensor, positions: Tensor) -> Tensor:
        return self.layers(model)[index](x, None)

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        return x

    @abstractmethod
    def logits(self, model: nn.Module, x: Tensor) -> Tensor: ...

    def sentence_scores(self, model: nn.Module, x: Tensor) -> Tensor | None:
        return None


class HuggingFace(Family):
    """Families whose layers are BERT's."""

    def __init__(
        self, cls: type, config: type, body: str, head: Callable[[nn.Module, Tensor], Tensor], **settings: Any
    ) -> None:
        self.name, self.cls, self.config, self.body, self.head, self.settings = cls.__name__, cls, config, body, head, settings

    def build(self, **config: Any) -> nn.Module:
        special = {"type_vocab_size": 2, "pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}
        return self.cls(self.config(**{**BERT_SIZES, **special, **self.settings, **config}))

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return getattr(model, self.body).encoder.layer

    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor:
        body = getattr(model, self.body)
        x = body.embeddings(input_ids=ids, token_type_ids=types)
        return body.embeddings_project(x) if hasattr(body, "embeddings_project") else x

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.head(model, x)


class PreTraining(HuggingFace):
    returns = BertForPreTrainingOutput

    def arguments(self, batch: Rows) -> tuple[tuple, dict]:
        args, kwargs = super().arguments(batch)
        return args, {**kwargs, "next_sentence_label": batch.sentence}

    def sentence_scores(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.cls.seq_relationship(model.bert.pooler(x))


class DistilBert(Family):
    name = "DistilBertForMaskedLM"
    has_types = False

    def build(self, **config: Any) -> nn.Module:
        sizes = {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": 2,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_token_id": PAD,
        }
        return DistilBertForMaskedLM(DistilBertConfig(**sizes, **config))

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.distilbert.transformer.layer

    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor:
        return model.distilbert.embeddings(ids)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.vocab_projector(model.vocab_layer_norm(F.gelu(model.vocab_transform(x))))


class ModernBert(Family):
    name = "ModernBertForMaskedLM"
    has_types = False
    tolerance = 1e-5  # the family rotates queries and keys in fp32, whatever the weights are

    def build(self, **config: Any) -> nn.Module:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "local_attention": 8,
            "global_attn_every_n_layers": 3,
            "pad_token_id": PAD,
            "bos_token_id": CLS,
            "eos_token_id": SEP,
            "cls_token_id": CLS,
            "sep_token_id": SEP,
        }
        return ModernBertForMaskedLM(ModernBertConfig(**sizes, **config))

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.model.layers

    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor:
        return model.model.embeddings(input_ids=ids)

    def layer(self, model: nn.Module, index: int, x: Tensor, positions: Tensor) -> Tensor:
        layer = self.layers(model)[index]
        mask = None
        if layer.attention_type == "sliding_attention":
            mask = ((positions[:, None] - positions[None, :]).abs() <= 4)[None, None]
        return layer(x, mask, model.model.rotary_emb(x, positions[None], layer.attention_type))

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.model.final_norm(x)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.decoder(model.head(x))


class Scalar(Family):
    """Recipes: their models return what the loop differentiates."""

    hugging_face = False
    ignore_index = -1
    returns = Tensor

    def loss(self, output: Any, batch: Rows) -> Tensor:
        return output

    def eval_outputs(self, output: Any) -> list[Tensor]:
        return list(output) if isinstance(output, tuple) else [output]


class HelloDeepSpeed(Scalar):
    name = "HelloDeepSpeed"
    ignore_index = PAD

    def build(self, **config: Any) -> nn.Module:
        roberta = RobertaConfig(**BERT_SIZES, type_vocab_size=1, pad_token_id=PAD, **config)
        return recipe_models.RobertaMLMModel(roberta, RobertaModel(roberta))

    def arguments(self, batch: Rows) -> tuple[tuple, dict]:
        return (), {"src_tokens": batch.ids, "attention_mask": batch.mask, "tgt_tokens": self.labels(batch)}

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.encoder.layer

    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor:
        return model.encoder.embeddings(input_ids=ids)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.lm_head(x)


def sizes(**further: Any) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=VOCABULARY, hidden_size=WIDTH, layers=LAYERS, heads=2, length=40, **further)


class BingBert(Scalar):
    name = "bing_bert"

    def build(self) -> nn.Module:
        return recipe_models.BertForPreTrainingPreLN(sizes())

    def arguments(self, batch: Rows) -> tuple[tuple, dict]:
        return ((0, batch.ids, batch.mask, batch.types, batch.sentence, self.labels(batch)),), {"log": True}

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.bert.encoder.layer

    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor:
        return model.bert.embeddings(ids, types)

    def layer(self, model: nn.Module, index: int, x: Tensor, positions: Tensor) -> Tensor:
        output = self.layers(model)[index](x, x.new_zeros(1, 1, 1, x.shape[1]))
        return output[0] if isinstance(output, tuple) else output

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.bert.encoder.FinalLayerNorm(x)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        head = model.cls.predictions
        return head.decoder(head.transform(x)) + head.bias

    def sentence_scores(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.cls.seq_relationship(model.bert.pooler(x))


class AcademicBudget(BingBert):
    returns = tuple

    def __init__(self, mode: str, sparse: bool) -> None:
        self.name, self.mode, self.sparse = f"academic-budget {mode}{' sparse' if sparse else ''}", mode, sparse

    def build(self) -> nn.Module:
        config = sizes(encoder_ln_mode=self.mode, useLN=True, sparse_mask_prediction=self.sparse)
        return recipe_models.BertLMHeadModel(config)

    def arguments(self, batch: Rows) -> tuple[tuple, dict]:
        return ((0, batch.ids, batch.mask, batch.types, self.labels(batch)),), {}

    def loss(self, output: Any, batch: Rows) -> Tensor:
        (loss,) = output
        return loss

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        return x if self.mode == "post-ln" else super().finish(model, x)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        head = model.cls.predictions
        return head.transform(x) @ head.decoder.weight.T + (0.0 if self.sparse else head.bias)

    def sentence_scores(self, model: nn.Module, x: Tensor) -> None:
        return None


class Megatron(Scalar):
    returns = tuple

    def __init__(self, binary: bool) -> None:
        self.name, self.binary = "Megatron" + (" with sentence head" if binary else ""), binary

    def build(self) -> nn.Module:
        return recipe_models.BertModel(sizes(binary=self.binary))

    def arguments(self, batch: Rows) -> tuple[tuple, dict]:
        return (batch.ids, batch.mask), {"tokentype_ids": batch.types, "lm_labels": self.labels(batch)}

    def loss(self, output: Any, batch: Rows) -> Tensor:
        return recipe_models.megatron_loss(output, (batch.labels != -100).to(output[0].dtype), batch.sentence)

    def eval_outputs(self, output: Any) -> list[Tensor]:
        return [value for value in output[:2] if value is not None]

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.language_model.encoder.layers

    def embed(self, model: nn.Module, ids: Tensor, types: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])[None]
        return model.language_model.embedding(ids, positions, tokentype_ids=types).transpose(0, 1)

    def layer(self, model: nn.Module, index: int, x: Tensor, positions: Tensor) -> Tensor:
        allowed = torch.zeros(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        return self.layers(model)[index](x.transpose(0, 1), allowed)[0].transpose(0, 1)

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.language_model.encoder.final_layernorm(x)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.lm_head(x, model.language_model.embedding.word_embeddings.weight)

    def sentence_scores(self, model: nn.Module, x: Tensor) -> Tensor | None:
        return model.binary_head(model.language_model.pooler(x.transpose(0, 1))) if self.binary else None


def roberta_head(model: nn.Module, x: Tensor) -> Tensor:
    return model.lm_head(x)


def electra_head(model: nn.Module, x: Tensor) -> Tensor:
    return model.generator_lm_head(model.generator_predictions(x))


FAMILIES: list[Family] = [
    HuggingFace(BertForMaskedLM, BertConfig, "bert", lambda model, x: model.cls(x)),
    PreTraining(BertForPreTraining, BertConfig, "bert", lambda model, x: model.cls.predictions(x)),
    HuggingFace(RobertaForMaskedLM, RobertaConfig, "roberta", roberta_head),
    HuggingFace(XLMRobertaForMaskedLM, XLMRobertaConfig, "roberta", roberta_head),
    HuggingFace(CamembertForMaskedLM, CamembertConfig, "roberta", roberta_head),
    HuggingFace(ElectraForMaskedLM, ElectraConfig, "electra", electra_head, embedding_size=16),
    DistilBert(),
    ModernBert(),
    HelloDeepSpeed(),
    BingBert(),
    AcademicBudget("pre-ln", sparse=True),
    AcademicBudget("post-ln", sparse=False),
    Megatron(binary=True),
    Megatron(binary=False),
]


def build(family: Family, **config: Any) -> nn.Module:
    """A model in float64 and training mode; no parameter is near its default, and tokens stay apart in deep layers."""
    model = family.build(**config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.dim() == 2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.25 if matrix else 0.1))
            if not matrix and "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model.double().train()
