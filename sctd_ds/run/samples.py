"""Text with [MASK], and the words that the model puts there: what it has learned, for a person to read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from sctd_ds import data
from sctd_ds.data import PackedData
from sctd_ds.run import output

logger = logging.getLogger(__name__)

ROWS, LENGTH = 3, 24
"""How many validation rows are shown, and how many tokens of each."""
FILE = "samples.json"
"""In the run's folder: what the model answered before its first step."""


@dataclass(frozen=True)
class Sample:
    """A text with masks. The lists have a word for each."""

    text: str
    answers: list[str]
    """The words that were masked."""
    before: list[str] = field(default_factory=list)
    """The model's words before training; empty where they are not known."""
    after: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.text}\n{_listed({'text': self.answers, 'before': self.before, 'after': self.after})}"

    def while_training(self) -> str:
        """One line for the log."""
        return " ".join(f"{self.text} ({_listed({'text': self.answers, 'model': self.after})})".split())


def _listed(words: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(of)}" for name, of in words.items() if of)


def remember(model: nn.Module, packed: PackedData, folder: Path) -> None:
    """Write down what the untrained model answers, for `read`. The model stays in training or evaluation."""
    samples = [asdict(Sample(text, answers, before=words)) for text, answers, words in _fill(model, packed)]
    with output.replacing(folder / FILE) as partial:
        partial.write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")


def read(model: nn.Module, packed: PackedData, folder: Path) -> list[Sample]:
    """The samples with the words of the model as it is now, and of the untrained one if it was asked on the same text."""
    file, before = folder / FILE, dict[str, list[str]]()
    if file.exists():
        try:
            before = {sample["text"]: sample["before"] for sample in json.loads(file.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s is damaged (%s): the report leaves out the words before training", file, error)
    return [Sample(text, answers, before.get(text, []), words) for text, answers, words in _fill(model, packed)]


@torch.no_grad()
def _fill(model: nn.Module, packed: PackedData) -> list[tuple[str, list[str], list[str]]]:
    """Text, masked words and the model's words, for the first validation rows; nothing random is drawn."""
    ids, labels = _masked(packed)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    guesses = model(input_ids=ids.to(device)).logits.argmax(-1).cpu()
    model.train(training)
    filled = []
    for row, label, guess in zip(ids, labels, guesses, strict=True):
        masked = label != data.IGNORED
        shown = row[~torch.isin(row, _hidden(packed.tokenizer))]
        answers, words = (_words(packed.tokenizer, of[masked]) for of in (label, guess))
        filled.append((_text(packed.tokenizer, shown), answers, words))
    return filled


def _masked(packed: PackedData) -> tuple[Tensor, Tensor]:
    """Ids and labels [ROWS, LENGTH]; the masks are those of a validation, without its random words."""
    masker = data.Masker(packed.tokenizer, seed=0)
    batch = next(data.validation_batches(packed.validation, masker, batch_size=ROWS))
    ids, labels = batch["input_ids"][:, :LENGTH], batch["labels"][:, :LENGTH]
    return ids.masked_fill(labels != data.IGNORED, masker.mask_id), labels


def _hidden(tokenizer: transformers.PreTrainedTokenizerBase) -> Tensor:
    """Special tokens that a reader does without."""
    return torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])


def _words(tokenizer: transformers.PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    return [_text(tokenizer, id) for id in ids]


def _text(tokenizer: transformers.PreTrainedTokenizerBase, ids: Tensor) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)  # a batch of rows would give a list
    return text.strip()
