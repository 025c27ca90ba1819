"""Packing: from the parts' tokens to files of full rows. Any row's place in the stream of its split is known before it is made.

The documents of a split are joined into one stream with [SEP] between them; the stream is cut every `seq_length - 2` tokens,
and each piece is enclosed in [CLS] and [SEP]. Only the last row of a split is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sctd_ds.data import parts
from sctd_ds.data.split import HoldOut

SHARD = 1 << 27  # bytes of rows in a file

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Share:
    """A part's file, and the documents in it that are dropped: bool [documents], or empty."""

    file: Path
    dropped: np.ndarray


@dataclass(frozen=True)
class Size:
    """Documents and tokens that a part gives to a split."""

    documents: int
    tokens: int

    @property
    def stream(self) -> int:
        """With a [SEP] for each document."""
        return self.documents + self.tokens


@dataclass(frozen=True)
class Rows:
    """A file of rows to write: rows `first` to `last` of a split, from `shares`. The first share begins at `start` of the
    split's stream, whose first [SEP] counts although no row has it."""

    path: Path
    validation: bool
    shares: tuple[Share, ...]
    start: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """What all files of rows have in common."""

    seq_length: int
    ids: dict[str, int]
    id_type: str
    hold_out: HoldOut


@dataclass(frozen=True)
class Written:
    """A file of rows: the SHA-256 of the rows alone, and of the file, and how many tokens are unknown."""

    rows_sha256: bytes
    file: tuple[int, str]
    unknown: int


def measure(hold_out: HoldOut, share: Share) -> tuple[Size, Size]:
    """What a part gives to train and to validation."""
    keys, lengths = parts.read(share.file, "keys", "lengths")
    held_out, kept = hold_out(keys, lengths), ~share.dropped if len(share.dropped) else True
    train, validation = (
        Size(int(np.count_nonzero(mask)), int(lengths[mask].sum(dtype=np.int64)))
        for mask in (~held_out & kept, held_out & kept)
    )
    return train, validation


def plan(folder: Path, shares: Sequence[Share], sizes: Sequence[tuple[Size, Size]], layout: Layout) -> list[Rows]:
    """The files of rows of both splits, each of about SHARD bytes."""
    width = layout.seq_length - 2
    per_file = max(1, SHARD // (layout.seq_length * np.dtype(layout.id_type).itemsize))
    files = []
    for number, split in enumerate(SPLITS):
        ends = np.cumsum([size[number].stream for size in sizes])
        count = -(-(int(ends[-1]) - 1) // width)
        total = -(-count // per_file)
        for shard in range(total):
            first, last = shard * per_file, min((shard + 1) * per_file, count)
            begin, end = 1 + first * width, min(1 + last * width, int(ends[-1]))
            part, stop = int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1
            start = int(ends[part - 1]) if part else 0
            path = folder / split / f"data-{shard:05}-of-{total:05}.arrow"
            files.append(Rows(path, bool(number), tuple(shares[part:stop]), start, first, last))
    return files


def write(layout: Layout, rows: Rows) -> Written:
    """Write one file of rows."""
    import pyarrow

    width, kind = layout.seq_length - 2, np.dtype(layout.id_type)
    schema = pyarrow.schema({"input_ids": pyarrow.list_(pyarrow.from_numpy_dtype(kind), layout.seq_length)})
    digest, unknown = hashlib.sha256(), 0
    left = (rows.last - rows.first) * width
    skipped = 1 + rows.first * width - rows.start
    pending = np.empty(0, dtype=kind)
    with pyarrow.OSFile(str(rows.path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:

        def add(stream: np.ndarray) -> None:
            nonlocal unknown
            table = _frame(stream, layout)
            array = pyarrow.FixedSizeListArray.from_arrays(table.ravel(), type=schema.field(0).type)
            writer.write_batch(pyarrow.record_batch([array], schema=schema))
            digest.update(table.astype(kind.newbyteorder("<"), copy=False).data)
            unknown += int(np.count_nonzero(stream == layout.ids["unk"]))

        for share in rows.shares:
            stream = _stream(share, layout.hold_out, rows.validation)[skipped:]
            skipped = 0
            stream = stream[: left - len(pending)]
            pending = np.concatenate([pending, stream])
            if whole := len(pending) // width * width:
                add(pending[:whole])
                pending, left = pending[whole:], left - whole
        if len(pending):
            add(pending)
    return Written(digest.digest(), file_facts(rows.path), unknown)


def _stream(share: Share, hold_out: HoldOut, validation: bool) -> np.ndarray:
    """The tokens that a part gives to a split, with [SEP] before each document."""
    tokens, keys, lengths = parts.read(share.file, "tokens", "keys", "lengths")
    chosen = hold_out(keys, lengths) == validation
    if len(share.dropped):
        chosen &= ~share.dropped
    ends = np.cumsum(lengths + 1, dtype=np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))  # of runs of chosen documents
    places = np.concatenate([[0], ends])[edges]
    return np.concatenate([tokens[:0], *(tokens[a:b] for a, b in zip(places[::2], places[1::2], strict=True))])


def _frame(stream: np.ndarray, layout: Layout) -> np.ndarray:
    """A stream as rows, [rows, seq_length]; only one that is shorter than a row is padded."""
    width = layout.seq_length - 2
    used = min(width, len(stream))
    rows = np.full((-(-len(stream) // width), layout.seq_length), layout.ids["pad"], dtype=layout.id_type)
    rows[:, 0] = layout.ids["cls"]
    rows[:, 1 : 1 + used] = stream.reshape(len(rows), -1)
    rows[:, 1 + used] = layout.ids["sep"]
    return rows


def file_facts(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256."""
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
