"""A built data set on disk: what its folder holds, and reading it.

The folder holds rows in `train/` and `validation/` (Arrow, read memory-mapped), `tokenizer/` and `meta.json`, which is written
last and lists every file; `load` refuses a folder that lacks it or disagrees with it.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sctd_ds.data.files import META, SHARD, DataError
from sctd_ds.data.rows import SPLITS, file_facts
from sctd_ds.data.tokenizer import load_tokenizer, special_ids

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
READABLE = (1, FORMAT)
COUNTED = 20_000  # training rows that decide how frequent words are


@dataclasses.dataclass(frozen=True)
class Meta:
    """Description of a built data set, stored as its `meta.json`.

    `fingerprint` is a hash of the tokenizer and of every row: the same text, tokenizer and settings give the same fingerprint
    on any machine and on any number of them. Token counts exclude special tokens and separators. `documents` counts those
    that were read, `duplicates` those of them that were dropped for being in the text before. `files` maps each file to its
    size in bytes and its SHA-256.
    """

    format: int
    fingerprint: str
    seq_length: int
    vocab_size: int
    special_ids: dict[str, int]
    documents: int
    train_rows: int
    validation_rows: int
    train_tokens: int
    validation_tokens: int
    unknown_share: float
    sources: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]
    duplicates: int = 0
    text_bytes: int = 0
    """Of all documents, in UTF-8; 0 in format 1."""


@dataclasses.dataclass(frozen=True)
class PackedData:
    """A built data set: `train` and `validation` rows hold `input_ids`, uint16 or int32 [seq_length]."""

    path: Path
    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    meta: Meta


def load(path: str | Path, *, seq_length: int | None = None, verify: bool = False) -> PackedData:
    """Open a built data set, memory-mapped.

    This compares every file's size with `meta.json`, and the SHA-256 of all but the Arrow files; `verify` includes those and
    reads all of them.

    Raises:
        DataError: not a built data set, incomplete, altered, or built for another `seq_length`.
    """
    path = Path(path)
    meta = read_meta(path)
    if seq_length is not None:
        check_length(path, meta, seq_length)
    with ThreadPoolExecutor() as threads:  # one hashes less than a disk delivers
        list(threads.map(lambda name: _check_file(path, meta, name, verify), meta.files))
    train, validation = (_rows(path / split, meta) for split in SPLITS)
    return PackedData(path, train, validation, load_tokenizer(str(path / "tokenizer")), meta)


def _rows(folder: Path, meta: Meta) -> datasets.Dataset:
    import datasets

    if meta.format == 1:
        return datasets.load_from_disk(str(folder))
    names = sorted(name for name in meta.files if name.startswith(f"{folder.name}/"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(folder.parent / name)) for name in names])


def unigram_loss(packed: PackedData, validation_rows: int) -> float | None:
    """Cross-entropy of the validation words under the frequencies of the training words, in nats per token.

    This is the loss of a model that knows no more than how frequent words are. At most COUNTED training rows are counted,
    evenly spread. None without validation rows.
    """
    if not len(packed.validation):
        return None
    step = -(-len(packed.train) // COUNTED)
    train, validation = (
        np.concatenate(rows.with_format("numpy")[:stop:every]["input_ids"], axis=None)
        for rows, stop, every in ((packed.train, None, step), (packed.validation, validation_rows, None))
    )
    words = np.ones(len(packed.tokenizer), dtype=bool)
    words[list(packed.tokenizer.all_special_ids)] = False
    counts = (np.bincount(train, minlength=len(words)) + 1.0) * words  # plus one: a validation word may be new
    return float(np.log(counts.sum()) - np.log(counts[validation[words[validation]]]).mean())


def check_tokenizer(packed: PackedData, name: str) -> None:
    """Raise DataError unless the rows were made with the tokenizer `name` (a folder or Hub name).

    Another tokenizer's ids would stand for other words.
    """
    used, wanted = packed.tokenizer, load_tokenizer(name)

    def essence(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        return [tokenizer.get_vocab(), special_ids(tokenizer), parts["normalizer"], parts["pre_tokenizer"]]

    if essence(used) != essence(wanted):
        sizes = "" if len(used) == len(wanted) else f" ({len(used)} ids, not {len(wanted)})"
        raise DataError(
            f"{packed.path}: built with another tokenizer than that of {name}{sizes}; build it again with "
            f"--tokenizer {name}, or give pretrain.py the text"
        )


def read_meta(path: Path) -> Meta:
    file = path / META
    if (path / SHARD).is_file():
        raise DataError(f"{path}: one share of a build; put all of them together with `python -m sctd_ds.data merge`")
    if not file.is_file():
        raise DataError(f"{path}: not a built data set (no {META}); build one with `python -m sctd_ds.data build`")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["files"] = {name: (size, digest) for name, (size, digest) in fields["files"].items()}
        meta = Meta(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: damaged ({error}); build the data set again") from None
    if meta.format not in READABLE:
        raise DataError(f"{path}: format {meta.format}, but this version reads 1 to {FORMAT}; build the data set again")
    return meta


def check_length(path: Path, meta: Meta, seq_length: int) -> None:
    if meta.seq_length != seq_length:
        raise DataError(
            f"{path}: built for seq_length {meta.seq_length}, but seq_length {seq_length} was requested; "
            f"build it again with --seq-length {seq_length}, or train with {meta.seq_length}"
        )


def _check_file(path: Path, meta: Meta, name: str, verify: bool) -> None:
    """DataError unless a file of a built data set is there as it was written; see `load`."""
    file, facts = path / name, meta.files[name]
    if not file.is_file():
        raise DataError(f"{path}: {name} is missing, so the data set is incomplete; delete the folder, and build it again")
    hashed = verify or file.suffix != ".arrow"
    try:
        same = file.stat().st_size == facts[0] and (not hashed or file_facts(file) == facts)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    if not same:
        raise DataError(
            f"{path}: {name} has changed since it was built (damaged or edited); delete the folder, and build it again"
        )
