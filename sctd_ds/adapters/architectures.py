"""The architectures that pretrain.py trains: one table, a row for each `model_type` of transformers.

Another architecture is one more row, beside an adapter in `adapters.ADAPTERS`. It has to be a Hugging Face masked-LM model
whose configuration names sizes as BERT's does (hidden_size, num_hidden_layers, intermediate_size, max_position_embeddings,
vocab_size).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import nn

from sctd_ds.adapters.huggingface import BertAdapter, HuggingFaceAdapter, ModernBertAdapter, RobertaAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _known_activation(name: str) -> str:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"expected one of {', '.join(sorted(ACT2FN))}")
    return name


_ACTIVATION = Annotated[str, AfterValidator(_known_activation)]
_SIZE, _SHARE = Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, lt=1)]
_SIZES = dict.fromkeys(
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"), _SIZE
)


@dataclass(frozen=True)
class Operations:
    """What the operations of a layer depend on beside the sizes that every architecture has."""

    gated: bool = False
    """A feed-forward block with a gate (GeGLU): three products of hidden x intermediate instead of two."""
    windows: tuple[int | None, ...] = ()
    """By layer, how far to each side of itself a token attends; None: to the whole row, as in every layer that is not named."""


PLAIN = Operations()
"""BERT's."""


@dataclass(frozen=True)
class Architecture:
    """A row of the table."""

    adapter: type[HuggingFaceAdapter]
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `pretrain.model` for a new model with the types of their values: arguments of transformers' configuration class.
    Empty: there are no new models of this type, trained ones are continued from."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Values of these keys by a name, which `pretrain.model` may be."""
    operations: Callable[[PreTrainedConfig], Operations] = lambda config: PLAIN
    after_padding: bool = False
    """The position id of a row's first token is pad_token_id + 1, and positions are that many fewer; else it is 0."""
    ends: Callable[[Any], tuple[nn.Module, nn.Module]] | None = None
    """What a model's pipeline has before the layers, on the first stage, and after them, on the last; None: it has none."""


def _modern_operations(config: Any) -> Operations:
    windows = (config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
    return Operations(gated=True, windows=tuple(windows))


def _modern_ends(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.model.embeddings, nn.ModuleList([model.model.final_norm, model.head, model.decoder])


_ROBERTA = Architecture(RobertaAdapter, after_padding=True)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        BertAdapter,
        keys={
            **_SIZES,
            "type_vocab_size": _SIZE,
            "hidden_act": _ACTIVATION,
            "hidden_dropout_prob": _SHARE,
            "attention_probs_dropout_prob": _SHARE,
            "initializer_range": _SHARE,
            "layer_norm_eps": _SHARE,
        },
        presets={
            "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
            "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        },
        ends=lambda model: (model.bert.embeddings, model.cls),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "modernbert": Architecture(
        ModernBertAdapter,
        keys={
            **_SIZES,
            "local_attention": Annotated[int, Field(ge=2)],
            "global_attn_every_n_layers": _SIZE,
            "layer_types": list[Literal["full_attention", "sliding_attention"]],
            "global_rope_theta": Annotated[float, Field(gt=0)],
            "local_rope_theta": Annotated[float, Field(gt=0)],
            "hidden_activation": _ACTIVATION,
            "embedding_dropout": _SHARE,
            "attention_dropout": _SHARE,
            "mlp_dropout": _SHARE,
            "initializer_range": _SHARE,
            "initializer_cutoff_factor": Annotated[float, Field(gt=0)],
            "norm_eps": _SHARE,
            "norm_bias": bool,
            "attention_bias": bool,
            "mlp_bias": bool,
            "decoder_bias": bool,
        },
        presets={
            "modernbert-base": {
                "hidden_size": 768,
                "num_hidden_layers": 22,
                "num_attention_heads": 12,
                "intermediate_size": 1152,
                "local_attention": 128,
                "global_attn_every_n_layers": 3,
            },
            "modernbert-large": {
                "hidden_size": 1024,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "intermediate_size": 2624,
                "local_attention": 128,
                "global_attn_every_n_layers": 3,
            },
        },
        operations=_modern_operations,
        ends=_modern_ends,
    ),
}

DEFAULT = "bert"
"""The `model_type` of a new model whose sizes do not name one."""

PRESETS: dict[str, dict[str, Any]] = {
    name: {**({} if kind == DEFAULT else {"model_type": kind}), **sizes}
    for kind, row in ARCHITECTURES.items()
    for name, sizes in row.presets.items()
}
"""Names that `pretrain.model` may have, and the block that each stands for."""
