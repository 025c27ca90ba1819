"""A BERT that trains in milliseconds."""

from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM


def small_bert(**config: Any) -> BertForMaskedLM:
    """4 layers of width 32, 64 ids, 32 positions, no dropout, and always the same weights; `config` replaces any of it."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertForMaskedLM(BertConfig(**{**sizes, **config}))
