"""Tokenizers: loading one, training one on counted words, and encoding documents fast."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sctd_ds.data.files import DataError
from sctd_ds.data.readers import BLOCK, cut

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALPHABET = 1000  # a trained vocabulary spells this many characters, the most frequent ones; BERT's own trainer has this limit
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges*", "*.model")  # files of any type of tokenizer
KNOWN_WORDS = 1 << 19  # words whose ids an encoder remembers, and words that are counted at a time
KNOWN_CHARACTERS = 1 << 24
FED_WORDS = 1 << 25  # words that the trainer reads
COUNTED_WORDS = 1 << 21  # different words of a sample; beyond, the rarest are forgotten


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer with all five special tokens. If `name` is a folder, the network is not used. Raises DataError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).exists(), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: cannot be loaded as a tokenizer ({reason}); give a folder or a Hub name") from None
    if not tokenizer.is_fast:
        raise DataError(f"{name}: only fast tokenizers (tokenizer.json) are supported, got {type(tokenizer).__name__}")
    if missing := [name for name, token_id in special_ids(tokenizer).items() if token_id is None]:
        raise DataError(f"{name}: the tokenizer has no {', '.join(missing)} token; masked-LM training needs all five")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers' result for a folder without a tokenizer
        raise DataError(f"{name}: the tokenizer has no vocabulary; is its tokenizer.json missing?")
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")}


def id_type(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """The smallest type for ids that has room for the vocabulary: uint16, or int32."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32)


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps([backend, special_ids(tokenizer)], sort_keys=True).encode()).hexdigest()


# --- training --------------------------------------------------------------------------------------------------------


class WordCounter:
    """Counts the words of documents as BERT's tokenizers see them: lower case or not, without accents, apart from marks.

    At most COUNTED_WORDS different words are kept: beyond that the rarest ones go, in an order that depends on the documents.
    """

    def __init__(self, lowercase: bool):
        from tokenizers import normalizers, pre_tokenizers

        self.lowercase = lowercase
        self.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.words: collections.Counter[str] = collections.Counter()

    def add(self, documents: Iterable[str]) -> None:
        seen: collections.Counter[str] = collections.Counter()
        for document in documents:
            seen.update(_spaced(document).split(" "))
            if len(seen) > KNOWN_WORDS:
                self._add(seen)
                seen.clear()
        self._add(seen)

    def merge(self, words: Mapping[str, int]) -> None:
        self.words.update(words)
        if len(self.words) > COUNTED_WORDS:
            kept = sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[: COUNTED_WORDS // 2]
            self.words = collections.Counter(dict(kept))

    def _add(self, seen: collections.Counter[str]) -> None:
        words: collections.Counter[str] = collections.Counter()
        for text, count in seen.items():
            if text.isascii() and text.isalnum():  # what the two steps below would give
                words[text.lower() if self.lowercase else text] += count
                continue
            for piece in itertools.chain.from_iterable(map(self._pieces, cut(text))):
                words[piece] += count
        self.merge(words)

    def _pieces(self, text: str) -> Iterator[str]:
        return (piece for piece, _ in self.pre_tokenizer.pre_tokenize_str(self.normalizer.normalize_str(text)))


def train_tokenizer(
    words: collections.Counter[str], vocab_size: int, lowercase: bool, seq_length: int
) -> PreTrainedTokenizerBase:
    """WordPiece over BERT's normalizer and pre-tokenizer, from a WordCounter's words: the same vocabulary in every run.

    The trainer numbers symbols in the order of a hash map whose seed differs between processes, and breaks ties between
    merges by these numbers. So it receives all its initial symbols in a fixed order: characters, and their "##" forms.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertTokenizer

    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:ALPHABET]
    apart = pre_tokenizers.BertPreTokenizer()
    continuing = ["##" + c for c in sorted(characters) if len(apart.pre_tokenize_str("a" + c)) == 1]
    least = len(SPECIAL_TOKENS) + len(characters) + len(continuing)
    if vocab_size < least:
        raise DataError(f"vocab_size {vocab_size} is too small for the characters of this text; give at least {least}")

    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + continuing,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=sys.stderr.isatty(),
    )
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.train_from_iterator(_repeated(words), trainer)
    return BertTokenizer(vocab=model.get_vocab(), do_lower_case=lowercase, model_max_length=seq_length)


def _repeated(words: collections.Counter[str]) -> Iterator[str]:
    """Texts with each word as often as it was counted, or that divided by what brings all of them to FED_WORDS.

    The trainer takes no counts, and a large sample as it is would keep all processes but this one waiting.
    """
    divisor = -(-sum(words.values()) // FED_WORDS)
    for word, count in words.items():
        for start in range(0, count // divisor, 1 << 12):
            yield f"{word} " * min(1 << 12, count // divisor - start)


# --- encoding --------------------------------------------------------------------------------------------------------


def _spaced(text: str) -> str:
    """The text with spaces for line ends and tabs, at which BERT's tokenizers split like at a space."""
    return text.replace("\n", " ").replace("\t", " ").replace("\r", " ")


class Encoder:
    """Token ids of documents, without special tokens: those of `tokenizer(text, add_special_tokens=False)`, but faster.

    BERT's tokenizers split at every space, and no word's ids depend on its neighbours. So the ids of a word are computed
    once, and looked up after that, for all words of a batch at a time. Other tokenizers encode whole documents. The names
    of special tokens within a text are text.
    """

    _ids: np.ndarray  # of all known words, end to end
    _starts: np.ndarray  # by a word's number
    _lengths: np.ndarray

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._by_word = _splits_at_spaces(tokenizer)
        self._forget()

    def __call__(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The documents' ids end to end, int32, and how many each has, int64 [documents]."""
        # Long documents are encoded in pieces: encodings need far more memory than their ids.
        pieces = [[text] if len(text) <= BLOCK else list(cut(text)) for text in documents]
        flat = list(itertools.chain.from_iterable(pieces))
        ids, lengths = self._encode_words(flat) if self._by_word else self._encode(flat)
        if len(flat) > len(documents):
            firsts = np.cumsum([0, *map(len, pieces)])[:-1]
            lengths = np.add.reduceat(lengths, firsts)
        return ids, lengths

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts, lengths = [np.empty(0, dtype=np.int32)], []
        for start in range(0, len(texts), 256):
            for encoding in self._backend.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
                parts.append(np.array(encoding.ids, dtype=np.int32))
                lengths.append(len(parts[-1]))
        return np.concatenate(parts), np.array(lengths, dtype=np.int64)

    def _encode_words(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        spaced = [_spaced(text) for text in texts]
        words = " ".join(spaced).split(" ")
        numbers = np.fromiter(map(self._numbers.__getitem__, words), dtype=np.int64, count=len(words))
        self._learn()
        lengths, starts = self._lengths[numbers], self._starts[numbers]
        ends = np.cumsum(lengths)
        ids = self._ids[np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)]
        counts = np.array([text.count(" ") + 1 for text in spaced])
        per_text = np.add.reduceat(lengths, np.cumsum(counts) - counts)
        if len(self._numbers) > KNOWN_WORDS or self._numbers.characters > KNOWN_CHARACTERS:
            self._forget()
        return ids, per_text

    def _learn(self) -> None:
        """Encode the words that the last batch brought."""
        if not self._numbers.new:
            return
        ids, lengths = self._encode(self._numbers.new)
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])
        self._numbers.new = []

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._ids = np.empty(0, dtype=np.int32)
        self._starts = np.empty(0, dtype=np.int64)
        self._lengths = np.empty(0, dtype=np.int64)


class _Numbers(dict[str, int]):
    """Words by number, in the order of their first use; `new` holds those since it was last emptied."""

    def __init__(self) -> None:
        self.new: list[str] = []
        self.characters = 0

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        self.characters += len(word)
        return number


def _splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's ids are those of the words between its spaces, line ends and tabs."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    types = [(parts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    added = set(tokenizer.added_tokens_decoder) - set(tokenizer.all_special_ids)  # they may contain spaces, or eat them
    return types == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not added
