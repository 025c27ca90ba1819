"""A BERT and a ModernBERT that train in milliseconds."""

from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def small_bert(**config: Any) -> BertForMaskedLM:
    """4 layers of width 32, 64 ids, 32 positions, no dropout, and always the same weights; `config` replaces any of it."""
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**{**SIZES, **no_dropout, **config}))


def small_modernbert(**config: Any) -> ModernBertForMaskedLM:
    """Likewise, with local layers that see four tokens to each side. Id 0 is that of all special tokens."""
    torch.manual_seed(0)
    special = {f"{name}_token_id": 0 for name in ("pad", "cls", "sep", "bos", "eos")}
    return ModernBertForMaskedLM(ModernBertConfig(**{**SIZES, **special, "local_attention": 8, **config}))
