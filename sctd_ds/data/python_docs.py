"""English text that every Python installation contains: its language reference, and the docstrings of its modules."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from sctd_ds.data.readers import cut

_RULER = re.compile(r"^[ \t]*([^\w\s])\1{2,}[ \t]*\n", re.MULTILINE)  # underlines of headings


def python_docs(limit: int | None) -> Iterator[str]:
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
