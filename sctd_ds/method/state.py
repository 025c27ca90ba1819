"""What the method knows about one model, and what its next training forward does."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sctd_ds.adapters import Adapter, Batch, find_adapter
from sctd_ds.adapters.special_tokens import released_special_ids, special_ids
from sctd_ds.config import ConfigError, ScTDConfig
from sctd_ds.method.encoder import Encoder
from sctd_ds.method.labels import Labelled, locate_labels
from sctd_ds.method.plan import LayerPlan, kept_tokens
from sctd_ds.method.schedule import Mode
from sctd_ds.method.selection import POLICIES, Importance, Selection

logger = logging.getLogger(__name__)


class ScTD:
    """The configuration, layer plan, encoder and importance table of a converted model."""

    def __init__(self, model: nn.Module, config: ScTDConfig) -> None:
        adapter = find_adapter(model)
        check_trainable(adapter)
        self.config = config
        self.plan = LayerPlan(len(adapter.layers), drops=config.method != "dense")
        if config.document_mask is True:
            raise ConfigError("sctd.document_mask is true, and no tokenizer is known here: set it to the separator's id")
        self.encoder = Encoder(adapter, documents=config.document_mask is not False)
        keep_ids = resolve_keep_ids(config, adapter.vocabulary)
        self.importance: Importance = POLICIES[config.importance](adapter.vocabulary, config, keep_ids)
        self.mode: Mode = "drop" if self.plan.drops else "dense"
        """What the model's own forward does in training, set by `sctd_ds.set_mode`; `step` likewise."""
        self.step: int | None = None
        self.parts: dict[str, Tensor] = {}
        """Detached parts of the last training forward's objective, on the device: its return value is the model's own."""

        self.kept_share = 1.0
        """Share of the tokens that the last selection kept."""

    @property
    def adapter(self) -> Adapter:
        return self.encoder.adapter

    @property
    def has_table(self) -> bool:
        """Whether tokens are dropped by a table of scores."""
        return self.plan.drops and self.importance.has_table

    @property
    def both_passes(self) -> Mode:
        """The mode in which evaluation compares the passes: both of them, or the full one where no token is dropped."""
        return "align" if self.plan.drops else "dense"

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The micro-batch in the arguments of the model's forward; see `Adapter.batch`.

        With `document_mask`, its attention_mask numbers the documents of each row from 1, separators included; 0 is padding.
        """
        batch, separator = self.adapter.batch(args, kwargs), self.config.document_mask
        if separator is False:
            return batch
        ends = batch.input_ids == separator
        numbers = 1 + ends.cumsum(dim=1) - ends.long()
        real = batch.attention_mask
        return replace(batch, attention_mask=numbers if real is None else numbers * (real != 0))

    def select(self, batch: Batch) -> Selection:
        """Choose the kept tokens of a micro-batch: once, never again in recomputation."""
        length = batch.input_ids.shape[1]
        keep = kept_tokens(length, self.config.drop_ratio)
        self.kept_share = keep / length
        return self.importance.select(batch.input_ids, keep, batch.attention_mask)

    def locate(self, batch: Batch) -> Labelled:
        """Find the labelled tokens, and with them the positions at which the last layer has to run. Evaluation may mask more
        tokens than training, so it counts them."""
        config, adapter = self.config, self.adapter
        bound = config.labels_per_row if adapter.layers[-1].training else None
        labelled = locate_labels(batch.labels, adapter.ignore_index, bound, adapter.vocabulary)
        return labelled if config.last_layer == "all" or adapter.black_box else labelled.narrowed()


def check_trainable(adapter: Adapter) -> None:
    """Refuse a frozen encoder with ValueError: there would be nothing to align and no cost to save."""
    if not any(parameter.requires_grad for layer in adapter.layers for parameter in layer.parameters()):
        raise ValueError(
            "no parameter of the encoder's layers is trainable (requires_grad): token dropping saves work in training them. "
            "Unfreeze layers, or train without sctd_ds"
        )


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


def resolve_keep_ids(config: ScTDConfig, vocabulary: int) -> list[int]:
    """Ids to pin. "auto" knows some released vocabularies by their size; a run with a tokenizer passes its own ids."""
    if config.keep_token_ids != "auto":
        return config.keep_token_ids
    if config.method == "dense" or not POLICIES[config.importance].has_table:
        return []
    known = released_special_ids(vocabulary)
    if known is None:
        logger.warning(
            'sctd.keep_token_ids is "auto", but the special tokens of a vocabulary of %d ids are not known here: none is '
            "pinned. Set it to the ids of UNK, CLS, SEP and MASK.",
            vocabulary,
        )
    return known or []
