"""Evaluation data: from a local folder, else from the local cache of Hugging Face `datasets`, else from the Hub if allowed.

Every row is checked when it is read, so a model only sees rows with the columns, types and labels that the task declares.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sctd_ds.eval.tasks import PROBE_NOTE, PROBES, Task

Row = dict[str, Any]
SUMS = "SHA256SUMS"
TAG_NAMES = "labels.json"


class EvalError(ValueError):
    """A problem with models or data to evaluate. Its message is one line that names the place and the remedy."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """EvalError in place of what reading a file that is no text, or is damaged, raises."""
    try:
        yield
    except EvalError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise EvalError(f"{path}: cannot be read, or the files beside it ({error}); expected UTF-8 text as written") from None


def load(task: Task, split: str, data_dir: Path | None = None, hub: bool = False) -> list[Row]:
    """The checked rows of one split.

    Reads `data_dir/<task>/<split>.{parquet,jsonl,csv,tsv,conll}`, else the local cache, else, with hub=True, the Hub.
    Returns classes as numbers, scores as floats, tags as names. Raises EvalError.
    """
    if data_dir is not None:
        for suffix, read in READERS.items():
            path = data_dir / task.name / f"{split}.{suffix}"
            if path.is_file():
                with _reading(path):
                    _verify(path)
                    names = _tag_names(path.parent / TAG_NAMES)
                    return list(check(task, read(path), str(path), names))
    rows = _from_hub(task, split, offline=not hub)
    if rows is None:
        expected = f"{data_dir / task.name}/{split}.{{{','.join(READERS)}}}" if data_dir else "no --data-dir was given"
        raise EvalError(f"{task.name}: no data ({expected}; not in the local cache); {schema(task)}. {remedy(task)}")
    return rows


def load_probe(name: str, data_dir: Path | None) -> dict[str, list[tuple[str, str]]]:
    """(label, sentence) pairs of a probing task in SentEval's format, by split: train, validation, test. Raises EvalError."""
    file, labels = PROBES[name]
    note = f"expected lines of tr, va or te <tab> {' or '.join(labels)} <tab> sentence; {PROBE_NOTE.format(file=file)}"
    path = (data_dir or Path()) / file
    if data_dir is None or not path.is_file():
        raise EvalError(f"{name}: no file {path if data_dir else file + ' (no --data-dir was given)'}; {note}")
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    where = {"tr": "train", "va": "validation", "te": "test"}
    with _reading(path):
        for number, line in _lines(path):
            parts = line.split("\t")
            if len(parts) < 3 or parts[0] not in where or parts[1] not in labels:
                raise EvalError(f"{name}: {path}, line {number}: found {line[:60]!r}; {note}")
            splits[where[parts[0]]].append((parts[1], parts[-1]))
    incomplete = [split for split, rows in splits.items() if len({label for label, _ in rows}) < 2]
    if incomplete:
        raise EvalError(f"{name}: {path} lacks one of the labels in {', '.join(incomplete)}; {note}")
    return splits


def fetch(tasks: Sequence[Task], folder: Path, say: Callable[[str], None] = print) -> list[str]:
    """Download tasks as Parquet, with SHA-256 sums, for machines without a network. Returns the tasks that have no source.

    A task that is complete and intact is not downloaded again. Tags are stored by name. Raises EvalError.
    """
    import pyarrow
    import pyarrow.parquet

    without = []
    for task in tasks:
        target = folder / task.name
        splits = ("train", *task.splits)
        if (target / SUMS).is_file() and all((target / f"{split}.parquet").is_file() for split in splits):
            for split in splits:
                _verify(target / f"{split}.parquet")
            say(f"{task.name}: already downloaded and intact")
            continue
        if task.source.repo is None:
            say(f"{task.name}: cannot be downloaded. {remedy(task)}")
            without.append(task.name)
            continue
        target.mkdir(parents=True, exist_ok=True)
        sums = {}
        for split in splits:
            rows = _from_hub(task, split, offline=False)
            assert rows is not None
            path = target / f"{split}.parquet"
            partial = path.with_suffix(".partial")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
            partial.replace(path)
            sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            say(f"{task.name}: {split}, {len(rows):,} rows")
        (target / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    return without


def check(task: Task, rows: Iterator[tuple[str, Row]], path: str, tag_names: list[str] | None = None) -> Iterator[Row]:
    """Rows of a task with their columns checked and converted. rows: (place, row). Raises EvalError naming the place."""
    empty = True
    for place, row in rows:
        empty = False
        try:
            clean = _checked(task, row, tag_names)
        except _Invalid as error:
            column = error.column
            found = f"is {str(row[column])[:60]!r}" if column in row else f"is missing (there are: {', '.join(map(str, row))})"
            raise EvalError(
                f"{task.name}: {path}{place}: column {column!r} {found}, expected {error.expected}; {schema(task)}"
            ) from None
        yield clean
    if empty:
        raise EvalError(f"{task.name}: {path} has no rows; {schema(task)}. {remedy(task)}")


class _Invalid(Exception):
    """A column of a row that is not as expected."""

    def __init__(self, column: str, expected: str) -> None:
        self.column, self.expected = column, expected


def _checked(task: Task, row: Row, tag_names: list[str] | None) -> Row:
    """A row with its label converted. Raises _Invalid."""
    clean = dict(row)
    if task.kind == "tag":
        clean[task.label] = _tags(task, row, tag_names)
        return clean
    for column in task.inputs:
        if not isinstance(row.get(column), str):
            raise _Invalid(column, "text")
    if task.kind == "span":
        clean[task.label] = _answers(task, row)
    elif task.kind == "regress":
        clean[task.label] = _score(task, row)
    else:
        clean[task.label] = _class(task, row)
    if task.kind == "choose" and row["question"] not in ("cause", "effect"):
        raise _Invalid("question", "cause or effect")
    if task.name == "multirc":
        clean["question_id"] = _question_of(row)
    return clean


def schema(task: Task) -> str:
    """The columns of a task, in words."""
    if task.kind == "classify":
        label = f"{task.label} (0 to {len(task.classes) - 1}: {', '.join(task.classes)})"
    elif task.kind == "choose":
        label = f"{task.label} (0 or 1); question is cause or effect"
    elif task.kind == "regress":
        label = f"{task.label} (a number from {task.score_range[0]:g} to {task.score_range[1]:g})"
    elif task.kind == "span":
        label = "answers ({text: [...], answer_start: [...]}" + ("; both empty: no answer)" if task.no_answer else ")")
    else:
        label = f"{task.label} (one tag per token)"
    return f"columns: {', '.join(task.inputs)}; {label}"


def remedy(task: Task) -> str:
    """How to get a task's data."""
    source = task.source
    if source.repo is None:
        return f"Every repository would run its own code, so get {source.note}"
    fetch = f"python -m sctd_ds.eval fetch --to DIR --tasks {task.name}"
    note = f" ({source.note})" if source.note else ""
    return f"On a machine with network access: {fetch}, then --data-dir DIR{note}"


def _class(task: Task, row: Row) -> int:
    """The number of the row's class, which may be given by name."""
    value, classes = row.get(task.label), task.classes
    if isinstance(value, str):
        if value in classes:
            value = classes.index(value)
        elif value.isdigit():
            value = int(value)
    if not isinstance(value, int) or not 0 <= value < len(classes):
        raise _Invalid(task.label, " or ".join(f"{i} ({name})" for i, name in enumerate(classes)))
    return int(value)


def _score(task: Task, row: Row) -> float:
    low, high = task.score_range
    try:
        value = float(row.get(task.label))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _Invalid(task.label, f"a number from {low:g} to {high:g}") from None
    if not low <= value <= high:
        raise _Invalid(task.label, f"a number from {low:g} to {high:g}")
    return value


def _tags(task: Task, row: Row, names: list[str] | None) -> list[str]:
    """The names of the row's tags, one per token."""
    tokens, tags = row.get("tokens"), row.get(task.label)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise _Invalid("tokens", "a list of words")
    expected = f"a tag (B-TYPE, I-TYPE or O; or its number, with names in {TAG_NAMES}) for each of {len(tokens)} tokens"
    if not isinstance(tags, list) or len(tags) != len(tokens):
        raise _Invalid(task.label, expected)
    if names is not None and all(isinstance(tag, int) and 0 <= tag < len(names) for tag in tags):
        tags = [names[tag] for tag in tags]
    # IOB1, the scheme of the shared task's own files, needs no conversion: seqeval counts the same entities.
    if not all(isinstance(tag, str) and (tag == "O" or tag[:2] in ("B-", "I-")) for tag in tags):
        raise _Invalid(task.label, expected)
    return tags


def _answers(task: Task, row: Row) -> Row:
    """The row's answers and their positions in the context."""
    answers = row.get(task.label)
    texts, starts = (answers.get("text"), answers.get("answer_start")) if isinstance(answers, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise _Invalid(task.label, "{text: [...], answer_start: [...]} of equal lengths")
    if not texts and not task.no_answer:
        raise _Invalid(task.label, "at least one answer")
    found = []
    for text, start in zip(texts, starts, strict=True):
        # Some copies of SQuAD strip contexts, which shifts a few answers by a character or two.
        near = [at for at in range(max(0, start - 2), start + 3) if row["context"].startswith(text, at)]
        if not near:
            raise _Invalid(task.label, f"answers that occur in the context at answer_start ({start}: {text[:30]!r} does not)")
        found.append(min(near, key=lambda at: abs(at - start)))
    return {"text": texts, "answer_start": found}


def _question_of(row: Row) -> str:
    """The question that an answer of MultiRC belongs to, by number if the row has one, else by text."""
    index = row.get("idx")
    if isinstance(index, dict):
        return f"{index['paragraph']}/{index['question']}"
    return hashlib.sha256(f"{row['paragraph']}\0{row['question']}".encode()).hexdigest()


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise EvalError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    for i, row in enumerate(rows):
        yield f", row {i}", row


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise EvalError(f"{path}, line {number}: not JSON ({reason}); expected one object per line") from None
        if not isinstance(row, dict):
            raise EvalError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield f", line {number}", row


def _separated(path: Path) -> Iterator[tuple[str, Row]]:
    # Tab-separated data sets do not quote fields: a quotation mark is text.
    tabs = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        for row in reader:
            if None in row or None in row.values():
                comparison = "more" if None in row else "fewer"
                expected = f"expected the {len(reader.fieldnames or ())} fields of the header"
                raise EvalError(f"{path}, line {reader.line_num}: {comparison} fields, {expected}")
            yield f", line {reader.line_num}", dict(row)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: text may contain characters that Unicode counts as line ends.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\n")


def _conll(path: Path) -> Iterator[tuple[str, Row]]:
    """Word first, tag last, blank lines between sentences; skips -DOCSTART- lines."""
    tokens: list[str] = []
    tags: list[str] = []
    first = 1

    def row() -> tuple[str, Row]:
        return f", line {first}", {"tokens": list(tokens), "ner_tags": list(tags), "tags": list(tags)}

    for number, line in _lines(path):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if tokens:
                yield row()
            tokens, tags, first = [], [], number + 1
        elif len(parts) < 2:
            raise EvalError(f"{path}, line {number}: found {line!r}, expected a word, further columns, and its tag last")
        else:
            tokens.append(parts[0])
            tags.append(parts[-1])
    if tokens:
        yield row()


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    "parquet": _parquet,
    "jsonl": _jsonl,
    "csv": _separated,
    "tsv": _separated,
    "conll": _conll,
}


def _tag_names(path: Path) -> list[str] | None:
    """Names of numbered tags: a JSON list, or an object from name to number."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return sorted(content, key=content.__getitem__) if isinstance(content, dict) else content


def _verify(path: Path) -> None:
    """Compare a file with its SHA-256, if the folder lists any. Raises EvalError."""
    sums = path.parent / SUMS
    if not sums.is_file():
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, name = line.split("  ", 1)
        if name == path.name and expected != digest:
            raise EvalError(
                f"{path}: its SHA-256 differs from that in {SUMS}, so it was changed or truncated; "
                "delete the folder and fetch again"
            )


def _from_hub(task: Task, split: str, offline: bool) -> list[Row] | None:
    """A split from the Hub or, if offline, from the cache of an earlier download; None if there is none."""
    import datasets
    import huggingface_hub

    source = task.source
    if source.repo is None:
        return None
    names: list[str] | None = None
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or before
    try:
        if source.files is None:
            loaded = datasets.load_dataset(source.repo, source.config, split=split)
            if task.kind == "tag":
                names = loaded.features[task.label].feature.names
        else:
            download = functools.partial(
                huggingface_hub.hf_hub_download, source.repo, repo_type="dataset", local_files_only=offline or before
            )
            names = _tag_names(Path(download(source.labels))) if source.labels else None
            files = [download(name) for name in source.files[split]]
            loaded = datasets.load_dataset("json", data_files=files, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        if offline:
            return None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EvalError(f"{task.name}: {source.repo} could not be downloaded ({reason}); check the network") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return list(check(task, ((f", row {i}", row) for i, row in enumerate(loaded)), source.repo, names))
