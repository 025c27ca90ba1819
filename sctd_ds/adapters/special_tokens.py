"""The ids of UNK, CLS, SEP and MASK, which token dropping always keeps."""

from __future__ import annotations

from typing import Any

from sctd_ds.config import ConfigError, ScTDConfig

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


def of_tokenizer(config: ScTDConfig, tokenizer: Any) -> ScTDConfig:
    """The method with the ids of a tokenizer: of `keep_token_ids` "auto", and of `document_mask` true. Raises ConfigError."""
    found: dict[str, Any] = {}
    if config.keep_token_ids == "auto":
        found["keep_token_ids"] = special_ids(tokenizer)
    if config.document_mask is True:
        found["document_mask"] = getattr(tokenizer, "sep_token_id", None)
        if found["document_mask"] is None:
            raise ConfigError("sctd.document_mask is true, but the tokenizer has no separator: set it to an id, or to false")
    return config.model_copy(update=found)


def released_special_ids(vocabulary: int) -> list[int] | None:
    """The same for the released vocabulary of this size; None if the size is unknown."""
    return _RELEASED.get(vocabulary)
