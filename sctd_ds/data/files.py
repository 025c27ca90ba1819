"""The files that text lies in: on this machine or behind a URL, compressed or not."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

META = "meta.json"  # marks a folder as a built data set
SHARD = "shard.json"  # marks a folder as one machine's share of a build
CHUNK = 1 << 20  # bytes read at a time

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HINT = "give a path to text, a URL, 'python-docs', or a Hub data set 'owner/name'"


class DataError(ValueError):
    """A problem with the user's data. Its message is one line that names the place and the remedy."""


@dataclass(frozen=True)
class File:
    """A file of text.

    `name` is its path or URL, `label` its place below the source that it was found in, which other machines share; `size` is
    in bytes, 0 where a server does not tell; `stamp` changes when the content does, as far as that shows without reading.
    """

    name: str
    label: str
    size: int
    stamp: str


def find(source: str, suffixes: Collection[str]) -> list[File]:
    """The file that `source` names, or the text files below the folder, sorted, without hidden files and built data sets.

    Raises:
        DataError: nothing of that name, nothing that can be read, or no text in the folder.
    """
    if not source:
        raise DataError(f"a source is empty (''); {_HINT}")
    files = _remote(source, suffixes) if is_url(source) else _local(source, suffixes)
    if not files:
        raise DataError(f"{source}: no text in this folder; expected files ending in {', '.join(suffixes)}")
    return files


def is_url(source: str) -> bool:
    return _URL.match(source) is not None


def suffix(name: str) -> str:
    """The lower-case suffix that decides the reader; both of the last two for a compressed file."""
    path = PurePosixPath(urlsplit(name).path) if is_url(name) else Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def unreadable(name: str | Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{name}: cannot be read ({reason}); check the file and its permissions")


# --- on this machine -------------------------------------------------------------------------------------------------


def _local(source: str, suffixes: Collection[str]) -> list[File]:
    root = Path(os.path.expanduser(source))
    if not stat.S_ISDIR(_stat(root).st_mode):
        if suffix(root.name) not in suffixes:
            raise DataError(f"{root}: unknown file type; expected one of {', '.join(suffixes)}")
        return [_regular(root, root.name)]
    if _is_built(root):
        raise DataError(f"{source}: already a built data set; give the text it was built from, or use the data set itself")
    if (root / "dataset_dict.json").exists():
        raise DataError(f"{source}: holds several splits; name the folder of one, such as {root / 'train'}")

    def fail(error: OSError) -> None:
        raise unreadable(error.filename or root, error)

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if f[0] != "." and not _is_built(Path(folder) / f)]
        if {"state.json", "dataset_info.json"} <= set(names):  # written by `datasets`, which keeps more beside its rows
            names = [name for name in names if name.startswith("data-")]
        paths = [Path(folder) / name for name in names if _is_text(name, suffixes)]
        files += [_regular(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(files, key=lambda file: Path(file.name))


def _is_built(folder: Path) -> bool:
    return (folder / META).exists() or (folder / SHARD).exists()


def _is_text(name: str, suffixes: Collection[str]) -> bool:
    return name[0] != "." and suffix(name) in suffixes


def _regular(path: Path, label: str) -> File:
    """The file. Raises DataError for a pipe or a device, from which reading may never end."""
    facts = _stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{path}: not a regular file; give files, or remove it from the folder")
    return File(str(path), label, facts.st_size, f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file or folder; {_HINT}") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise unreadable(path, OSError(*error.args)) from None


# --- behind a URL ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _words_for(url: str) -> Iterator[None]:
    """DataError for whatever a file system's library raises: they have no common exception."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{url}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{url}: no such file or folder there") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{url}: cannot be read ({reason}); check the address, the connection and your credentials") from None


def _remote(url: str, suffixes: Collection[str]) -> list[File]:
    import fsspec

    with _words_for(url):
        system, root = fsspec.core.url_to_fs(url)
        if any(sign in root for sign in "*?[") and suffix(url) not in ("", *suffixes):
            raise DataError(f"{url}: unknown file type; expected one of {', '.join(suffixes)}")
        if "*" in root:
            paths = [path for path in system.glob(root) if _is_text(PurePosixPath(path).name, suffixes)]
        elif suffix(url) in suffixes:
            paths = [root]
        else:
            paths = [path for path in system.find(root) if _is_text(PurePosixPath(path).name, suffixes)]
            if not paths and not system.isdir(root):
                raise DataError(f"{url}: no such folder, or an unknown file type; expected one of {', '.join(suffixes)}")
        files = []
        for path in sorted(paths):
            facts = system.info(path)
            name = url if path == root else system.unstrip_protocol(path)
            label = PurePosixPath(path).name if path == root else path.removeprefix(root).lstrip("/")
            files.append(File(name, label, facts.get("size") or 0, f"{name} {system.ukey(path)}"))
        return files


# --- opening ---------------------------------------------------------------------------------------------------------


def _zstd(raw: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _zstd,
    ".xz": lzma.LZMAFile,
}


def open_file(name: str) -> Any:
    """A binary file, as it lies there."""
    if not is_url(name):
        return open(name, "rb")
    import fsspec

    return fsspec.open(name, "rb").open()


def chunks(name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The content from byte `start` to `stop`, decompressed, CHUNK bytes at a time; then b"" once. Raises DataError."""
    unpack = COMPRESSIONS.get("." + suffix(name).rpartition(".")[2])
    try:
        with open_file(name) as raw, contextlib.closing(unpack(raw)) if unpack else contextlib.nullcontext(raw) as file:
            if start:
                file.seek(start)
            left = stop - start if stop is not None else None
            while left != 0:
                data = file.read(CHUNK if left is None else min(CHUNK, left))
                if not data:
                    break
                left = None if left is None else left - len(data)
                yield bytes(data)
    except Exception as error:  # decompressors, and file systems behind URLs, raise anything
        raise unreadable(name, error) from None
    yield b""
