"""The ids of UNK, CLS, SEP and MASK, which token dropping always keeps."""

from __future__ import annotations

from typing import Any

# Of released vocabularies, by size; recipes pad BERT's to a multiple of 8, 64 or 128.
_RELEASED = {
    **{size: [100, 101, 102, 103] for size in (30522, 30528, 30592)},  # BERT uncased, ELECTRA, DistilBERT
    **{size: [100, 101, 102, 103] for size in (28996, 29000, 29056)},  # BERT cased
    50265: [0, 2, 3, 50264],  # RoBERTa
    250002: [0, 2, 3, 250001],  # XLM-RoBERTa
    50368: [50280, 50281, 50282, 50284],  # ModernBERT
}


def special_ids(tokenizer: Any) -> list[int]:
    """The ids of those of UNK, CLS, SEP and MASK that a Hugging Face tokenizer has, ascending."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "cls", "sep", "mask"))
    return sorted({i for i in ids if i is not None})


def released_special_ids(vocabulary: int) -> list[int] | None:
    """The same for the released vocabulary of this size; None if the size is unknown."""
    return _RELEASED.get(vocabulary)
