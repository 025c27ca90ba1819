"""Readers: the documents of a piece of a source, by the type of its file.

A document is a block between blank lines of a `.txt` file, or a record of the other types. A long block of a `.txt` file is
cut at line ends or spaces into documents of at most 8,192 characters: so one endless line needs little memory and can be
split between training and validation. A record may hold token ids instead of text.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sctd_ds.data.files import COMPRESSIONS, DataError, chunks, open_file, unreadable

BLOCK = 8192  # most characters of a document in text without records
TOKENS = "input_ids"  # the column of token ids

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """What one process reads of a source, from beginning to end.

    `file` is its path or URL, or the name of a Hub data set; `label` the same on every machine. `start` and `stop` count bytes
    of a text file, row groups of a Parquet file, or batches of an Arrow file; `stop` None is the end. `size` estimates the
    bytes of its text, 0 where they are unknown. `tokens` says that the records hold token ids.
    """

    file: str
    label: str
    kind: str
    stamp: str
    size: int
    start: int = 0
    stop: int | None = None
    tokens: bool = False


Document = str | np.ndarray
"""Text, or the token ids of it, int64 [any]."""


class _BadRecord(ValueError):
    """What is wrong with a record, in words that follow its place; `line` counts from the record's first."""

    def __init__(self, problem: str, line: int = 0):
        super().__init__(problem)
        self.line = line


# --- text ------------------------------------------------------------------------------------------------------------


def _decoded(piece: Piece) -> Iterator[str]:
    """UTF-8 text in parts, without a byte-order mark and with \\n as line end; b"" at the end of `chunks` flushes it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = piece.start  # of the first byte that the decoder has not decoded
    for data in chunks(piece.file, piece.start, piece.stop):
        if offset == 0 and data.startswith(codecs.BOM_UTF8):
            data, offset = data[3:], 3
        held = len(decoder.getstate()[0])
        if (nul := data.find(b"\0")) >= 0:
            raise DataError(
                f"{piece.file}: byte {offset + held + nul} is NUL, so this is not UTF-8 text but a binary file or UTF-16; "
                "convert it to UTF-8 first"
            )
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{piece.file}: not UTF-8 at byte {offset + error.start} (0x{error.object[error.start]:02x}); "
                "convert it first, e.g. `iconv -f LATIN1 -t UTF-8`"
            ) from None
        offset += held + len(data) - len(decoder.getstate()[0])
        yield newlines.decode(text, final=not data)


def cut(text: str) -> Iterator[str]:
    """Pieces of at most BLOCK characters, cut at a line end if there is one, else at a space, else anywhere."""
    start = 0
    while len(text) - start > BLOCK:
        end = text.rfind("\n", start + 1, start + BLOCK)
        if end < 0:
            end = text.rfind(" ", start + 1, start + BLOCK)
        if end < 0:
            end = start + BLOCK
        yield text[start:end]
        start = end
    yield text[start:]


def _text(piece: Piece, column: str) -> Iterator[str]:
    rest, inside = "", False  # inside: `rest` continues a block, so that its cuts must not move
    for chunk in _decoded(piece):
        blocks = _BLANK_LINES.split(rest + chunk)
        if not inside:
            blocks[0] = blocks[0].lstrip()
        inside = inside and len(blocks) == 1
        rest = blocks.pop()
        for block in blocks:
            yield from cut(block)
        *pieces, rest = cut(rest)
        inside = inside or bool(pieces)
        yield from pieces
    yield rest


def _lines(piece: Piece) -> Iterator[str]:
    parts: list[str] = []
    for chunk in _decoded(piece):
        first, *others = chunk.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


# --- records ---------------------------------------------------------------------------------------------------------


def _json_lines(piece: Piece, column: str) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(_lines(piece), start=1):  # noqa: B007, read where a record is bad
            if line.strip():
                yield _field(_parsed(line), column)
    except _BadRecord as bad:
        raise DataError(f"{piece.file}, line {_lines_before(piece) + number}{bad}") from None


def _lines_before(piece: Piece) -> int:
    return sum(data.count(b"\n") for data in chunks(piece.file, 0, piece.start)) if piece.start else 0


def _json(piece: Piece, column: str) -> Iterator[str]:
    """An array of objects, or JSON lines in a `.json` file."""
    start = next((chunk.lstrip()[:1] for chunk in _decoded(piece) if chunk.strip()), "")
    if start != "[":
        yield from _json_lines(piece, column)
        return
    try:
        records = _parsed("".join(_decoded(piece)))
    except _BadRecord as bad:
        raise DataError(f"{piece.file}, line {1 + bad.line}{bad}") from None
    assert isinstance(records, list)
    number = 0
    try:
        for number, record in enumerate(records, start=1):  # noqa: B007
            yield _field(record, column)
    except _BadRecord as bad:
        raise DataError(f"{piece.file}, record {number}{bad}") from None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRecord(
            f", column {error.colno}: not valid JSON ({error.msg}); "
            "expected one object per line, or an array of objects in a .json file",
            error.lineno - 1,
        ) from None
    except RecursionError:
        raise _BadRecord(": JSON nested too deeply; expected flat objects") from None
    except ValueError:
        raise _BadRecord(f": a number with more than {sys.get_int_max_str_digits()} digits") from None


def _field(record: object, column: str) -> str:
    """The text of a record; null counts as empty, because exporters write empty text as null."""
    if not isinstance(record, dict):
        raise _BadRecord(f": expected an object with a column '{column}', got {type(record).__name__}")
    if column not in record:
        raise _BadRecord(f": {no_column(column, record)}")
    text = record[column]
    if not isinstance(text, str | None):
        raise _BadRecord(f": column '{column}' holds {type(text).__name__}, expected a string")
    if text and not text.isascii() and _SURROGATE.search(text):
        raise _BadRecord(f": column '{column}' holds half a surrogate pair, which is not valid text; fix the record")
    return text or ""


def no_column(column: str, columns: Iterable[str]) -> str:
    names = ", ".join(f"'{name}'" for name in columns) or "none"
    return f"no column '{column}'; there are {names}: choose one (text_column, --text-column)"


def _csv(piece: Piece, column: str) -> Iterator[str]:
    """Records under a line of column names, fields in quotation marks where they hold commas, marks or line ends."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((line + "\n" for line in _lines(piece)), delimiter="\t" if ".tsv" in piece.kind else ",")
    header = next((row for row in rows if row), [])
    if column not in header:
        raise DataError(f"{piece.file}: {no_column(column, header)}")
    place = header.index(column)
    for row in rows:
        if len(row) > place:
            yield row[place]
        elif row and row != [""]:
            raise DataError(f"{piece.file}, line {rows.line_num}: {len(row)} fields, but '{column}' is field {place + 1}")


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(piece: Piece, column: str) -> Iterator[Document]:
    """Parquet and Arrow files."""
    import pyarrow

    name = TOKENS if piece.tokens else column
    try:
        with open_file(piece.file) as raw:
            batches = _parquet_batches(raw, piece, name) if piece.kind == ".parquet" else _arrow_batches(raw, piece)
            for batch in batches:
                yield from (_ids(batch.column(name), piece) if piece.tokens else _strings(batch.column(name), name, piece))
    except pyarrow.ArrowException as error:
        raise not_a_table(piece.file, error) from None
    except OSError as error:
        raise unreadable(piece.file, error) from None


def not_a_table(file: str, error: Exception) -> DataError:
    return DataError(f"{file}: not a readable Parquet or Arrow file ({(str(error).splitlines() or ['damaged'])[0]})")


def _parquet_batches(raw: Any, piece: Piece, name: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(raw) as file:
        groups = range(file.num_row_groups)[piece.start : piece.stop]
        yield from file.iter_batches(batch_size=1000, row_groups=list(groups), columns=[name])


def arrow_reader(raw: Any) -> Iterator[Any]:
    """The batches of an Arrow file, in the format of files or that of streams, which `datasets` writes."""
    import pyarrow

    if raw.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(raw)
        return map(file.get_batch, range(file.num_record_batches))
    raw.seek(0)
    return iter(pyarrow.ipc.open_stream(raw))


def _arrow_batches(raw: Any, piece: Piece) -> Iterator[Any]:
    return itertools.islice(arrow_reader(raw), piece.start, piece.stop)


def _strings(column: Any, name: str, piece: Piece) -> Iterator[str]:
    for text in column.to_pylist():
        try:
            yield _field({name: text}, name)
        except _BadRecord as bad:
            raise DataError(f"{piece.file}{bad}") from None


def _ids(column: Any, piece: Piece) -> Iterator[np.ndarray]:
    import pyarrow.compute

    flat = pyarrow.compute.list_flatten(column)
    if not pyarrow.types.is_integer(flat.type) or flat.null_count:
        raise DataError(f"{piece.file}: column '{TOKENS}' holds {column.type}, expected a list of whole numbers")
    ids = flat.to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    yield from np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else ()


# --- the Hub ---------------------------------------------------------------------------------------------------------


def hub(piece: Piece, column: str) -> Iterator[str]:
    import datasets

    name, _, config = piece.file.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for record in rows:
            yield _field(record, column)
    except _BadRecord as bad:
        raise DataError(f"{piece.file}{bad}") from None
    except Exception as error:  # networks, servers and foreign files raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{piece.file}: no such path here, and it could not be read as a Hub data set ({reason}); "
            "check the name and the connection"
        ) from None


Reader = Callable[[Piece, str], Iterator[Document]]
TEXT_READERS: dict[str, Reader] = {".txt": _text, ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
READERS: dict[str, Reader] = {
    **TEXT_READERS,
    ".parquet": _table,
    ".arrow": _table,
    **{kind + packed: reader for kind, reader in TEXT_READERS.items() for packed in COMPRESSIONS},
}
"""By the suffix of a file. Text may be compressed."""
