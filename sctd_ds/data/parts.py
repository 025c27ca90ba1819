"""Parts of a build: the pieces that one process tokenizes, each result a file with its own check.

A part's file is named after everything that decides its content. So a build that was killed, or another machine's share of
it, is continued with the files that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sctd_ds.data import sources
from sctd_ds.data.files import DataError
from sctd_ds.data.readers import Document, Piece
from sctd_ds.data.sources import PIECE
from sctd_ds.data.tokenizer import Encoder, WordCounter, id_type, load_tokenizer, special_ids

BATCH = 1 << 20  # characters of text, or ids, that are encoded at a time
SUFFIX = ".safetensors"
_ALIKE = 0.8  # share of texts that survive decoding and encoding
_TRIED, _LOOKED_AT = 512, 32  # documents that are tried, and the ids of each

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """Pieces of one source that are tokenized together. `number` is the part's place in the build, `source` its source's."""

    number: int
    source: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of text, estimated; 0 if unknown."""
        return sum(piece.size for piece in self.pieces)


def plan(names: Sequence[str], text_column: str) -> list[Part]:
    """The parts of a build of these sources: about PIECE bytes of text each, if the files can be cut. Raises DataError."""
    parts: list[Part] = []
    for source, name in enumerate(names):
        group: list[Piece] = []
        for piece in sources.pieces(name, text_column):
            if group and sum(other.size for other in group) + piece.size > PIECE:
                parts.append(Part(len(parts), source, tuple(group)))
                group = []
            group.append(piece)
        if not group:
            raise sources.no_text(name)
        parts.append(Part(len(parts), source, tuple(group)))
    return parts


@dataclass(frozen=True)
class Facts:
    """What a part's file holds. `documents` counts those without tokens too; `text` is bytes of UTF-8."""

    documents: int
    kept: int
    tokens: int
    text: int
    sha256: str


@dataclass(frozen=True)
class Job:
    """What every part of a build has in common. `tokenizer` is its folder, `tokenizer_digest` its content."""

    folder: Path
    tokenizer: Path
    tokenizer_digest: str
    text_column: str
    seed: int

    def file(self, part: Part) -> Path:
        """The part's file; parts of equal content, as of a file that is given twice, share one."""
        key = [self.tokenizer_digest, self.text_column, self.seed, [asdict(piece) for piece in part.pieces]]
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}{SUFFIX}"


# --- tokenizing ------------------------------------------------------------------------------------------------------


def tokenize(job: Job, part: Part) -> Facts:
    """Write the part's file, unless it is there and whole. Raises DataError for bad text."""
    path = job.file(part)
    if (facts := check(path)) is not None:
        return facts
    encoder, tokenizer = _encoder(job)
    ids, kind, vocab_size = special_ids(tokenizer), id_type(tokenizer), len(tokenizer)
    salt = job.seed.to_bytes(8, "little")
    streams, lengths, keys = [], [], bytearray()
    documents = text_bytes = 0
    checked = False
    for batch in batches(part, job.text_column):
        texts = [document for document in batch if isinstance(document, str)]
        if texts:
            raw = [text.encode() for text in texts]
            found, counts = encoder(texts)
        else:
            given = [piece for document in batch for piece in _clean(document, ids, vocab_size, part)]
            if not given:
                continue
            if not checked:
                _check_alike(given, tokenizer, encoder, part)
                checked = True
            raw = [document.astype("<i4").tobytes() for document in given]
            found, counts = np.concatenate(given).astype(np.int32), np.array(list(map(len, given)))
        documents += len(raw)
        text_bytes += sum(map(len, raw))
        for data, count in zip(raw, counts.tolist(), strict=True):
            if count:
                keys += hashlib.blake2b(data, digest_size=8, salt=salt).digest()
        counts = counts[counts > 0]
        streams.append(np.insert(found, np.cumsum(counts) - counts, ids["sep"]).astype(kind))
        lengths.append(counts.astype(np.uint32))
    arrays = {
        "tokens": np.concatenate(streams) if streams else np.empty(0, dtype=kind),
        "lengths": np.concatenate(lengths) if lengths else np.empty(0, dtype=np.uint32),
        "keys": np.frombuffer(bytes(keys), dtype="<i8"),
    }
    return _write(path, arrays, documents, text_bytes)


_loaded: dict[str, tuple[Encoder, Any]] = {}


def _encoder(job: Job) -> tuple[Encoder, Any]:
    """The encoder of this process, which remembers words from part to part."""
    if job.tokenizer_digest not in _loaded:
        _loaded.clear()
        tokenizer = load_tokenizer(str(job.tokenizer))
        _loaded[job.tokenizer_digest] = Encoder(tokenizer), tokenizer
    return _loaded[job.tokenizer_digest]


def batches(part: Part, text_column: str) -> Iterator[list[Document]]:
    """The part's documents, some at a time, all of one kind."""
    batch: list[Document] = []
    held = 0
    for piece in part.pieces:
        for document in sources.read(piece, text_column):
            if batch and (held >= BATCH or type(document) is not type(batch[0])):
                yield batch
                batch, held = [], 0
            batch.append(document)
            held += len(document)
    if batch:
        yield batch


def _write(path: Path, arrays: Arrays, documents: int, text: int) -> Facts:
    from safetensors.numpy import save

    facts = Facts(documents, len(arrays["lengths"]), int(arrays["lengths"].sum(dtype=np.int64)), text, _digest(arrays))
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(save(arrays, metadata={"facts": json.dumps(asdict(facts))}))
    partial.replace(path)
    return facts


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def check(path: Path) -> Facts | None:
    """The facts of a part's file; None where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            facts = Facts(**json.loads(file.metadata()["facts"]))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    return facts if _digest(arrays) == facts.sha256 else None


def read(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a part's file: `tokens`, [SEP] before each document's; `lengths` without it, uint32; `keys`, int64."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return [file.get_tensor(name) for name in names]


# --- token ids from others -------------------------------------------------------------------------------------------


def _clean(ids: Document, special: dict[str, int], vocab_size: int, part: Part) -> list[np.ndarray]:
    """The documents of a record: without [CLS] and padding, and apart where [SEP] stands. Raises DataError."""
    assert isinstance(ids, np.ndarray)
    place = part.pieces[0].file
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise DataError(f"{place}: holds the id {wrong}, and the tokenizer's go from 0 to {vocab_size - 1}; name the right one")
    if (ids == special["mask"]).any():
        raise DataError(f"{place}: holds masked tokens (id {special['mask']}); give the ids as they were before masking")
    ids = ids[(ids != special["pad"]) & (ids != special["cls"])]
    ends = np.flatnonzero(ids == special["sep"])
    return [document for piece in np.split(ids, ends) if len(document := piece[piece != special["sep"]])]


def _check_alike(documents: list[np.ndarray], tokenizer: Any, encoder: Encoder, part: Part) -> None:
    """DataError unless decoding the ids and encoding the text gives most of them back, as for the tokenizer that made them.

    A tokenizer of whole words passes with any ids. Documents with unknown words do not count, for they are lost.
    """
    tried = [document[:_LOOKED_AT] for document in documents[:_TRIED]]
    tried = [ids for ids in tried if not (ids == tokenizer.unk_token_id).any()]
    if not tried:
        return
    again, counts = encoder([tokenizer.decode(ids) for ids in tried])
    found = np.split(again, np.cumsum(counts)[:-1])
    same = sum(np.array_equal(ids, back) for ids, back in zip(tried, found, strict=True))
    if same < _ALIKE * len(tried):
        raise DataError(
            f"{part.pieces[0].file}: its ids are not of this tokenizer: of {len(tried)} texts, {same} are the same after "
            "decoding and encoding; name the tokenizer that made them with --tokenizer"
        )


# --- the words of a sample -------------------------------------------------------------------------------------------


def count_words(part: Part, text_column: str, lowercase: bool, most: int) -> dict[str, int]:
    """How often each word occurs in the first `most` bytes of a part's text."""
    counter = WordCounter(lowercase)
    left = most
    for batch in batches(part, text_column):
        texts = []
        for document in batch:
            if left > 0 and isinstance(document, str):
                texts.append(document)
                left -= len(document) if document.isascii() else len(document.encode())
        counter.add(texts)
        if left <= 0:
            break
    return dict(counter.words)


def sample(parts: Sequence[Part], most: int, seed: int) -> list[tuple[Part, int]]:
    """Parts, and how many bytes of each, that make about `most` bytes of the text: all of it, or evenly chosen by the seed."""
    share = max(2 * PIECE, -(-most // len(parts)))  # a part larger than that could not be cut: its beginning stands for it
    chosen, held = [], 0
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(parts)), kind="stable")
    for number in order.tolist():
        if held >= most:
            break
        chosen.append((parts[number], min(share, most - held)))
        held += min(parts[number].size, share)
    return sorted(chosen, key=lambda item: item[0].number)
