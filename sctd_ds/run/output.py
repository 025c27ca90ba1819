"""What a run writes beside its checkpoints: a full disk or a folder that cannot be written is one line, and costs no result."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sctd_ds.config import ConfigError


class OutputError(RuntimeError):
    """A file of the run that could not be read or written; the checkpoints are as they were."""


def check(folder: Path) -> None:
    """ConfigError unless a run can write in `folder`, or make it. It tries, and leaves nothing behind."""
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.stat()  # refuses what cannot be a name
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 20))
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise ConfigError(f"{folder}: the run cannot write there ({error}); free space, or choose another --output") from None


@contextlib.contextmanager
def errors(what: Path | str) -> Iterator[None]:
    """OutputError in place of the file system's errors around what is done with a file, or with what the text says."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{what}: {getattr(error, 'strerror', None) or error}. The checkpoints are intact: free space or fix the folder, "
            "and start the same command again"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file to write, which then becomes `path`; if it cannot be written, `path` stays as it was. See `errors`."""
    partial = path.with_name(f"partial-{path.name}")
    with errors(path):
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
