"""Text sources: files, folders, the Hub, or the Python installation itself, each a stream of documents.

A document is a block between blank lines of a `.txt` file, a record of `.jsonl`, `.json`,
`.parquet` or a Hub data set, or all docstrings of one module for "python-docs". A long block of a
`.txt` file is cut at line ends or spaces into documents of at most 8,192 characters: so one endless
line needs little memory and can be split between training and validation.
"""

from __future__ import annotations

import ast
import codecs
import gzip
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import stat
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

BLOCK = 8192  # most characters of a document in text without records
CHUNK = 1 << 20  # bytes read at a time
META = "meta.json"  # marks a folder as a built data set

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PYTHON_DOCS = re.compile(r"python-docs(?::(\d+(?:\.\d+)?)(KB|MB|GB))?", re.IGNORECASE)
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_RULER = re.compile(r"^[ \t]*([^\w\s])\1{2,}[ \t]*\n", re.MULTILINE)  # underlines of headings
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class DataError(ValueError):
    """A problem with the user's data. Its message is one line that names the place and the remedy."""


def documents(source: str, text_column: str) -> Iterator[str]:
    """The documents of one source, stripped and never empty.

    Raises:
        DataError: the source is missing, unreadable, not text, empty, or lacks the text column.
    """
    found = False
    for text in _open_source(source, text_column):
        if text := text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"{source}: there is no text in it (empty or blank); give a source with text")


def identity(source: str) -> list[str]:
    """Strings that change when the source does, without reading it: names, sizes and times of files, or versions."""
    if _PYTHON_DOCS.fullmatch(source):
        return [source, sys.version, importlib.metadata.version("torch")]
    if _is_hub(source):
        return [source]
    stats = [(_stat(path), path.resolve()) for path in _files(source)]
    return [f"{path} {facts.st_size} {facts.st_mtime_ns}" for facts, path in stats]


def size(source: str) -> int:
    """Bytes on disk; 0 if unknown before reading."""
    if _PYTHON_DOCS.fullmatch(source) or _is_hub(source):
        return 0
    return sum(_stat(path).st_size for path in _files(source))


def _open_source(source: str, text_column: str) -> Iterator[str]:
    if match := _PYTHON_DOCS.fullmatch(source):
        limit = int(float(match[1]) * _UNITS[match[2].upper()]) if match[1] else None
        return _python_docs(limit)
    if _is_hub(source):
        return _hub(source, text_column)
    return (text for path in _files(source) for text in _reader(path)(path, text_column))


def _is_hub(source: str) -> bool:
    """Whether the source is `owner/name[:config]` and cannot be a path: a missing file is an error, never a download."""
    if not _HUB.fullmatch(source):
        return False
    path = Path(source)
    return not (os.path.exists(path) or path.parent.exists() or _suffix(path) in _READERS)


# --- files -----------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    """The lower-case suffix that decides the reader; both of the last two for a `.gz` file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise DataError(f"{path}: unknown file type; expected one of {', '.join(_READERS)}")
    return _READERS[suffix]


def _files(source: str) -> list[Path]:
    """The file itself, or the text files below a folder, sorted, without hidden files and built data sets."""
    if not source:
        raise DataError("a source is empty (''); give a path to text, 'python-docs', or a Hub data set 'owner/name'")
    root = Path(os.path.expanduser(source))
    if not stat.S_ISDIR(_stat(root).st_mode):
        _reader(root)
        return [_regular(root)]
    if (root / META).exists():
        raise DataError(f"{source}: already a built data set; give the text it was built from, or use the data set itself")

    def fail(error: OSError) -> None:
        raise _unreadable(error.filename or root, error)

    files: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if f[0] != "." and not (Path(folder) / f / META).exists()]
        texts = [Path(folder) / name for name in names if name[0] != "." and _suffix(Path(name)) in _READERS]
        files += map(_regular, texts)
    if not files:
        raise DataError(f"{source}: no text in this folder; expected files ending in {', '.join(_READERS)}")
    return sorted(files)


def _regular(path: Path) -> Path:
    """The path itself. Raises DataError for a pipe or a device, from which reading may never end."""
    if not stat.S_ISREG(_stat(path).st_mode):
        raise DataError(f"{path}: not a regular file; give files, or remove it from the folder")
    return path


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: no such file or folder; give a path to text, 'python-docs', or a Hub data set 'owner/name'"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise _unreadable(path, OSError(*error.args)) from None


def _decoded(path: Path) -> Iterator[str]:
    """Text of a UTF-8 file in chunks, without a byte-order mark and with \\n as line end; gzip is decompressed."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0  # of the first byte that the decoder has not decoded
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            while True:
                data = file.read(CHUNK)
                if offset == 0 and data.startswith(codecs.BOM_UTF8):
                    data, offset = data[3:], 3
                held = len(decoder.getstate()[0])
                if (nul := data.find(b"\0")) >= 0:
                    raise DataError(
                        f"{path}: byte {offset + held + nul} is NUL, so this is not UTF-8 text but a binary file or UTF-16; "
                        "convert it to UTF-8 first"
                    )
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}: not UTF-8 at byte {offset + error.start} (0x{error.object[error.start]:02x}); "
                        "convert it first, e.g. `iconv -f LATIN1 -t UTF-8`"
                    ) from None
                offset += held + len(data) - len(decoder.getstate()[0])
                yield newlines.decode(text, final=not data)
                if not data:
                    return
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three on a damaged file
        raise _unreadable(path, error if isinstance(error, OSError) else OSError(str(error))) from None


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


def _text(path: Path, text_column: str) -> Iterator[str]:
    rest = ""
    for chunk in _decoded(path):
        *blocks, rest = _BLANK_LINES.split(rest + chunk)
        for block in blocks:
            yield from cut(block)
        *pieces, rest = cut(rest)
        yield from pieces
    yield rest


def _lines(path: Path) -> Iterator[str]:
    parts: list[str] = []
    for chunk in _decoded(path):
        first, *others = chunk.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _json_lines(path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _field(_parsed(line, path, number), text_column, f"{path}, line {number}")


def _json(path: Path, text_column: str) -> Iterator[str]:
    """An array of objects, or JSON lines in a `.json` file."""
    start = next((chunk.lstrip()[:1] for chunk in _decoded(path) if chunk.strip()), "")
    if start != "[":
        yield from _json_lines(path, text_column)
        return
    records = _parsed("".join(_decoded(path)), path, 1)
    assert isinstance(records, list)
    for number, record in enumerate(records, start=1):
        yield _field(record, text_column, f"{path}, record {number}")


def _parsed(text: str, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg}); "
            "expected one object per line, or an array of objects in a .json file"
        ) from None
    except RecursionError:
        raise DataError(f"{path}, line {line}: JSON nested too deeply; expected flat objects") from None
    except ValueError:
        raise DataError(f"{path}, line {line}: a number with more than {sys.get_int_max_str_digits()} digits") from None


def _field(record: object, column: str, place: str) -> str:
    """The text of a record; null counts as empty, because exporters write empty text as null."""
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with a column '{column}', got {type(record).__name__}")
    if column not in record:
        raise DataError(f"{place}: no column '{column}'; there are {_names(record)}: choose one (text_column, --text-column)")
    text = record[column]
    if not isinstance(text, str | None):
        raise DataError(f"{place}: column '{column}' holds {type(text).__name__}, expected a string")
    if text and _SURROGATE.search(text):
        raise DataError(f"{place}: column '{column}' holds half a surrogate pair, which is not valid text; fix the record")
    return text or ""


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in columns) or "none"


def _parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise DataError(
                    f"{path}: no column '{text_column}'; there are {_names(columns)}: choose one (text_column, --text-column)"
                )
            for batch in file.iter_batches(batch_size=1000, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    yield _field({text_column: text}, text_column, str(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise _unreadable(path, error) from None


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt.gz": _text,
    ".jsonl.gz": _json_lines,
    ".json.gz": _json,
}


# --- the Hub, and Python's own documentation -------------------------------------------------------------------------


def _hub(source: str, text_column: str) -> Iterator[str]:
    import datasets

    match = _HUB.fullmatch(source)
    assert match is not None
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split="train", streaming=True)
        for record in rows:
            yield _field(record, text_column, source)
    except DataError:
        raise
    except Exception as error:  # networks, servers and foreign files raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: no such path here, and it could not be read as a Hub data set ({reason}); "
            "check the name and the connection"
        ) from None


def _python_docs(limit: int | None) -> Iterator[str]:
    """English text from the Python installation, cut off after the document that reaches `limit` bytes of UTF-8.

    First the language reference (`pydoc_data.topics`), then the docstrings of the standard library,
    then those of torch. Modules are parsed, never imported; equal docstrings appear once.
    """
    from pydoc_data.topics import topics

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    torch_spec = importlib.util.find_spec("torch")
    assert torch_spec is not None and torch_spec.submodule_search_locations
    modules = itertools.chain(_sources(stdlib), _sources(Path(torch_spec.submodule_search_locations[0])))
    seen: set[str] = set()
    reference = (topics[name] for name in sorted(topics))
    docstrings = (_docstrings(path, seen) for path in modules)
    total = 0
    for text in itertools.chain(reference, docstrings):
        for piece in cut(_RULER.sub("", text)):
            if limit is not None and total >= limit:
                return
            total += len(piece.encode())
            yield piece


def _sources(root: Path) -> list[Path]:
    """Python files below a folder, sorted, without installed packages and tests."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts))


def _docstrings(path: Path, seen: set[str]) -> str:
    """All docstrings of a file that are not in `seen`, separated by blank lines; none if the file does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in installed modules
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text not in seen:
                seen.add(text)
                found.append(text)
    return "\n\n".join(found)
