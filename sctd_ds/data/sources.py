"""Sources of documents: files, folders, URLs, the Hub, or the Python installation, each cut into pieces to read apart.

The pieces depend on the source alone. Their documents, one piece after the other, are those of the whole source.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sctd_ds.data import files, readers
from sctd_ds.data.files import DataError, File, is_url, suffix
from sctd_ds.data.python_docs import python_docs
from sctd_ds.data.readers import READERS, TOKENS, Document, Piece

PIECE = 1 << 24  # bytes of text that a process takes at a time, where a file can be cut

_PYTHON_DOCS = re.compile(r"python-docs(?::(\d+(?:\.\d+)?[KMG]B))?", re.IGNORECASE)
_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(?::[\w.-]+)?")
_STANDARD_INPUT = re.compile(r"-(\.[\w.]+)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)B", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_RATIO = {".gz": 3.0, ".zst": 3.5, ".xz": 4.0}  # of text to its compressed size, about
_EDGES = {".txt": re.compile(rb"\n[ \t\r]*\n"), ".jsonl": re.compile(rb"\n")}  # after which a file of text can be cut


def documents(source: str, text_column: str) -> Iterator[str]:
    """The documents of one source of text, stripped and never empty.

    Raises:
        DataError: the source is missing, unreadable, not text, empty, or lacks the text column.
    """
    found = False
    for piece in pieces(source, text_column):
        for document in read(piece, text_column):
            if not isinstance(document, str):
                raise DataError(f"{piece.file}: holds token ids, expected text")
            found = True
            yield document
    if not found:
        raise no_text(source)


def no_text(source: str) -> DataError:
    return DataError(f"{source}: there is no text in it (empty or blank); give a source with text")


def identity(source: str) -> list[str]:
    """Strings that change when the source does, without reading it: names, sizes and times of files, or versions."""
    if _PYTHON_DOCS.fullmatch(source):
        return [source, sys.version, importlib.metadata.version("torch")]
    if _is_hub(source):
        return [source]
    return [file.stamp for file in files.find(source, READERS)]


def pieces(source: str, text_column: str) -> list[Piece]:
    """The pieces of a source, in the order of its documents. Raises DataError."""
    if match := _PYTHON_DOCS.fullmatch(source):
        return [Piece(source, source, "python-docs", str(identity(source)), size_of(match[1]) if match[1] else 10**7)]
    if _is_hub(source):
        return [Piece(source, source, "hub", source, 0)]
    return [piece for file in files.find(source, READERS) for piece in _pieces_of(file, text_column)]


def read(piece: Piece, text_column: str) -> Iterator[Document]:
    """The documents of a piece, texts stripped, and none of them empty. Raises DataError."""
    if match := _PYTHON_DOCS.fullmatch(piece.file):
        found: Iterator[Document] = python_docs(size_of(match[1]) if match[1] else None)
    else:
        found = (readers.hub if piece.kind == "hub" else READERS[piece.kind])(piece, text_column)
    for document in found:
        if isinstance(document, str):
            document = document.strip()
        if len(document):
            yield document


def size_of(text: str) -> int:
    """Bytes that "2MB" means, or "1.5GB", "300KB", "10B". Raises ValueError for another form."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a size such as 500MB or 1GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def is_standard_input(source: str) -> bool:
    """Whether the source is "-", or "-" and the suffix of the file that standard input is: "-.jsonl.gz"."""
    return _STANDARD_INPUT.fullmatch(source) is not None and not os.path.exists(source)


def standard_input_kind(source: str) -> str:
    """The suffix that standard input has. Raises DataError for one that has no reader."""
    kind = suffix("stdin" + source[1:]) or ".txt"
    if kind not in READERS:
        raise DataError(f"{source}: unknown file type; expected - followed by one of {', '.join(READERS)}")
    return kind


def _is_hub(source: str) -> bool:
    """Whether the source is `owner/name[:config]` and cannot be a path: a missing file is an error, never a download."""
    if not _HUB.fullmatch(source):
        return False
    path = Path(source)
    ours = path.parts[0] == "data"  # where this project's own commands put data sets, there already or not
    return not (ours or os.path.exists(path) or path.parent.exists() or suffix(source) in READERS)


# --- cutting files ---------------------------------------------------------------------------------------------------


def _pieces_of(file: File, text_column: str) -> list[Piece]:
    kind = suffix(file.name)
    piece = functools.partial(Piece, file.name, file.label, kind, file.stamp)
    if kind in (".parquet", ".arrow"):
        return _table_pieces(file, kind, text_column)
    if kind not in _EDGES or file.size <= PIECE:
        return [piece(int(file.size * _RATIO.get("." + kind.rpartition(".")[2], 1)))]
    edges = [0, *_edges(file, _EDGES[kind]), file.size]
    return [piece(stop - start, start, stop) for start, stop in itertools.pairwise(edges)]


def _edges(file: File, mark: re.Pattern[bytes]) -> Iterator[int]:
    """Places, about PIECE bytes apart, where a file of text can be cut without changing its documents."""
    try:
        with files.open_file(file.name) as raw:
            edge = 0
            while file.size - edge > PIECE * 3 // 2:
                found = _next_edge(raw, edge + PIECE, mark)
                if found is None or found >= file.size:
                    return
                yield (edge := found)
    except Exception as error:  # file systems behind URLs raise anything
        raise files.unreadable(file.name, error) from None


def _next_edge(raw: IO[bytes], start: int, mark: re.Pattern[bytes]) -> int | None:
    """The first place behind a mark that begins at byte `start` or later; None if there is none."""
    raw.seek(start)
    window = b""
    while data := raw.read(1 << 16):
        window = window[-4096:] + data
        if match := mark.search(window):
            return start + len(data) - len(window) + match.end()
        start += len(data)
    return None


def _table_pieces(file: File, kind: str, text_column: str) -> list[Piece]:
    """Row groups of a Parquet file, or batches of an Arrow file, that hold about PIECE bytes of text."""
    import pyarrow

    try:
        with files.open_file(file.name) as raw:
            names, sizes = _parquet_sizes(raw, text_column) if kind == ".parquet" else _arrow_sizes(raw, file)
    except (pyarrow.ArrowException, EOFError) as error:
        raise readers.not_a_table(file.name, error) from None
    except Exception as error:
        raise files.unreadable(file.name, error) from None
    if text_column not in names and TOKENS not in names:
        raise DataError(f"{file.name}: {readers.no_column(text_column, names)}")
    found, start, held = [], 0, 0
    for number, size in enumerate(sizes, start=1):
        held += size
        if held >= PIECE or number == len(sizes):
            found.append(Piece(file.name, file.label, kind, file.stamp, held, start, number, text_column not in names))
            start, held = number, 0
    return found


def _parquet_sizes(raw: IO[bytes], text_column: str) -> tuple[list[str], list[int]]:
    """The columns, and the bytes of text in each row group."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(raw) as table:
        sizes = []
        for group in (table.metadata.row_group(number) for number in range(table.num_row_groups)):
            columns = [group.column(number) for number in range(group.num_columns)]
            of_text = [c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] == text_column]
            sizes.append(sum(of_text) or group.total_byte_size)
        return table.schema_arrow.names, sizes


def _arrow_sizes(raw: IO[bytes], file: File) -> tuple[list[str], list[int]]:
    """The columns, and the bytes of each batch."""
    import pyarrow

    source = raw if is_url(file.name) else pyarrow.memory_map(file.name)  # which reads the batches' sizes alone
    names: list[str] = []
    sizes = []
    for batch in readers.arrow_reader(source):
        names = batch.schema.names
        sizes.append(batch.nbytes)
    return names, sizes
