"""Building a packed data set from text: parts are tokenized apart, by any number of processes and machines, then packed.

What is finished lies in the folder `.NAME.building` beside the result until that is complete: a build that was killed goes on
from there. One build takes the same steps as several machines' shares and their merge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sctd_ds.data import parts, rows
from sctd_ds.data.files import CHUNK, META, SHARD, DataError
from sctd_ds.data.parts import Facts, Job, Part
from sctd_ds.data.sources import identity, is_standard_input, no_text, standard_input_kind
from sctd_ds.data.split import duplicates, hold_out
from sctd_ds.data.store import FORMAT, Meta, check_length, read_meta
from sctd_ds.data.tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER_FILES,
    Encoder,
    WordCounter,
    digest,
    id_type,
    load_tokenizer,
    special_ids,
    train_tokenizer,
)
from sctd_ds.data.workers import Workers, cores, duration, human, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEPT = 1 << 26  # bytes of finished parts that an error leaves: less is made again in a minute, and goes
FORECAST = 1 << 26  # bytes of text from which a forecast is worth its second
_HOW_TO_START = (
    "`python -m sctd_ds.data build my.txt --out {}` builds a data set from your text; `--data python-docs` trains at once, on "
    "English that Python contains"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the content of a data set, beside its text."""

    tokenizer: str | None
    lowercase: bool | None
    vocab_size: int | None
    tokenizer_sample: int | None
    seq_length: int
    validation_fraction: float
    seed: int
    text_column: str
    dedup: bool


@dataclasses.dataclass(frozen=True)
class Finished:
    """A tokenized part; `number` and `source` are those of the Part."""

    number: int
    source: int
    file: Path
    facts: Facts


def build(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 30522,
    lowercase: bool = True,
    tokenizer_sample: int = 10**9,
    seq_length: int = 512,
    validation_fraction: float = 0.01,
    seed: int = 0,
    text_column: str = "text",
    dedup: bool = False,
    num_proc: int | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Tokenize text and pack it into full rows on disk.

    Packing: the documents of a split are joined into one stream with [SEP] between them; the stream is cut every
    `seq_length - 2` tokens, and each piece is enclosed in [CLS] and [SEP]. A row may therefore begin or end inside a
    document. No token is lost, and only the last row of a split is padded.

    Validation is held out by document, in the order of a hash of (seed, text), until the documents fill the requested
    share and at least one row. Equal texts go to the same split, so no text is in both.

    A build that was killed goes on where it was when it is called again with the same arguments: parts that are finished, and
    whose files are whole, are not made again. The result is the same, bit for bit.

    Args:
        sources: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv` (each also `.gz`, `.zst`, `.xz`), `.parquet` and `.arrow` files,
            folders of them, URLs of either (s3://, gs://, hf://, https://; fsspec reads them), a Hub data set
            `owner/name[:config]` (its train split), "-" for standard input ("-.jsonl" for another type than text), or
            "python-docs[:2MB]", English text from the Python installation, of at most that size. A table without the text
            column but with `input_ids` is taken as tokenized: its ids are checked, and [CLS], [SEP] and padding removed.
        out: the folder to write. It appears complete or not at all.
        tokenizer: folder or name of an existing tokenizer; None trains a WordPiece vocabulary on a sample of the text.
        vocab_size, lowercase: of a trained tokenizer. A small text gives a smaller vocabulary.
        tokenizer_sample: bytes of text, chosen by the seed, that a tokenizer is trained on.
        seq_length: tokens per row, special tokens included.
        validation_fraction: of all tokens, in [0, 1).
        seed: decides which documents are held out, and the sample.
        text_column: the column of a record that holds the text.
        dedup: drop documents whose text was there before.
        num_proc: processes; None is one per core. They change speed only.
        shard: (i, n), the i-th of n shares (1 <= i <= n): `out` becomes a folder for `merge`.
        overwrite: replace a data set built earlier at `out`; `build` never replaces anything else.

    Returns:
        `out`.

    Raises:
        DataError: a source, the tokenizer, a setting or `out` is unusable; less than a minute's work is deleted.
    """
    out = Path(out)
    # Fail early: a bad setting, source or tokenizer must not show only after hours of reading.
    settings = Settings(
        tokenizer=tokenizer,
        lowercase=None if tokenizer else lowercase,
        vocab_size=None if tokenizer else vocab_size,
        tokenizer_sample=None if tokenizer else tokenizer_sample,
        seq_length=seq_length,
        validation_fraction=validation_fraction,
        seed=seed,
        text_column=text_column,
        dedup=dedup,
    )
    _check_settings(sources, settings, num_proc, shard)
    _check_vacant(out, overwrite)
    for source in sources:
        if is_standard_input(source):
            standard_input_kind(source)
        else:
            identity(source)
    given = load_tokenizer(tokenizer) if tokenizer else None

    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(out, overwrite))
        staging = stack.enter_context(_staging(out))
        names = [_spooled(source, staging) if is_standard_input(source) else source for source in sources]
        planned = parts.plan(names, text_column)
        if given is None and (ids := next((p for part in planned for p in part.pieces if p.tokens), None)):
            raise DataError(f"{ids.file}: holds token ids; name the tokenizer that made them with --tokenizer (tokenizer)")
        mine = planned if shard is None else planned[shard[0] - 1 :: shard[1]]
        workers = stack.enter_context(Workers(min(num_proc or cores(), len(planned))))
        tok = given or _train(planned, sources[0], settings, staging, workers)
        _replace(tok, staging / "tokenizer")
        job = Job(staging / "parts", staging / "tokenizer", digest(tok), text_column, seed)
        _forget_others(mine, job)
        _forecast(mine, job, settings, tok, workers.count, packs=shard is None)
        finished = _tokenize(mine, job, workers)
        if shard is None:
            _pack(finished, tok, settings, list(sources), staging, workers)
        else:
            _finish_share(finished, planned, settings, list(sources), digest(tok), shard, staging)
        _put_in_place(staging / "done", out)
    return out


def merge(shares: Sequence[str | Path], out: str | Path, *, num_proc: int | None = None, overwrite: bool = False) -> Path:
    """Pack the shares of a build, made by `build(..., shard=(i, n))` on any machines, into the data set of one build.

    Args:
        shares: all n folders, in any order. They stay as they are.
        out, num_proc, overwrite: as for `build`.

    Raises:
        DataError: a share is missing, damaged, or of another build.
    """
    out = Path(out)
    if not shares:
        raise DataError("no shares to merge; give the folders that `build --shard` wrote")
    _check_vacant(out, overwrite)
    read = [_read_share(Path(share)) for share in shares]
    first = read[0]
    for share, other in zip(shares, read, strict=True):
        if other["build"] != first["build"]:
            raise DataError(
                f"{share}: of another build than {shares[0]}; give all shares the same text, options and tokenizer, and "
                "name one with --tokenizer if none was given"
            )
    missing = sorted(set(range(1, first["of"] + 1)) - {share["share"] for share in read})
    if missing or len(read) != first["of"]:
        problem = f"of {first['of']} shares, {', '.join(map(str, missing))} lack" if missing else "a share is given twice"
        raise DataError(f"{problem}; give the folder of each share once")
    finished = [
        Finished(part["number"], part["source"], Path(share) / "parts" / part["file"], Facts(**part["facts"]))
        for share, content in zip(shares, read, strict=True)
        for part in content["parts"]
    ]
    finished.sort(key=lambda part: part.number)
    tok = load_tokenizer(str(Path(shares[0]) / "tokenizer"))
    processes = min(num_proc or cores(), len(finished))
    with _alone(out, overwrite), _staging(out) as staging, Workers(processes) as workers:
        for number, facts in workers.each(parts.check, [part.file for part in finished]):
            if facts != finished[number].facts:
                raise DataError(f"{finished[number].file}: missing or damaged; build this share again, or copy it again")
        _replace(tok, staging / "tokenizer")
        _pack(finished, tok, Settings(**first["settings"]), first["sources"], staging, workers)
        _put_in_place(staging / "done", out)
    return out


def check(spec: str | list[str], *, seq_length: int, rows: int = 1, tokenizer: str | None = None) -> None:
    """DataError where `prepare` and training on what it returns would fail, as far as that shows in a moment.

    Nothing is built, and no text is read; whether a Hub data set exists shows only when it is.

    Args:
        spec: as for `prepare`.
        seq_length: tokens of the rows to train on.
        rows: training rows that a built data set has to have, those of one step.
        tokenizer: the one that raw text would be cut with.
    """
    sources = [spec] if isinstance(spec, str) else list(spec)
    if built := _built(sources):
        meta = read_meta(built)
        check_length(built, meta, seq_length)
        if meta.train_rows < rows:
            raise DataError(
                f"{built}: {meta.train_rows} training rows are fewer than one batch of {rows}: "
                "add text, or lower train_batch_size or pretrain.seq_length"
            )
        return
    for source in sources:
        try:
            identity(source)
        except DataError as error:
            raise DataError(f"{error}. {_HOW_TO_START.format(source)}" if not Path(source).exists() else str(error)) from None
    if tokenizer:
        load_tokenizer(tokenizer)


def prepare(spec: str | list[str], cache_dir: str | Path, **build_options: Any) -> Path:
    """The path of a built data set: `spec` itself if it is one, else a data set built from the text of `spec`, once.

    Names, sizes and modification times of the text's files and the options identify a data set; any change
    causes a new build. Several processes may call this at once: one builds, the others wait for it.

    Args:
        spec: a built folder, or what `build` takes as sources.
        cache_dir: the folder that keeps the data sets built here.
        build_options: keyword arguments of `build`.
    """
    sources = [spec] if isinstance(spec, str) else list(spec)
    if built := _built(sources):
        return built
    identities, options = [identity(source) for source in sources], dict(build_options)
    options.pop("num_proc", None)
    tokenizer = options.get("tokenizer")
    if tokenizer and Path(tokenizer).is_dir():  # its content identifies it; a model in the same folder does not matter
        files = sorted({file for pattern in TOKENIZER_FILES for file in Path(tokenizer).glob(pattern)})
        options["tokenizer"] = [(file.name, rows.file_facts(file)) for file in files]
    out = Path(cache_dir) / _hash([FORMAT, identities, sorted(options.items())])[:16]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.with_suffix(".lock"), "w")  # noqa: SIM115, closed below
    except OSError as error:
        raise DataError(f"{cache_dir}: cannot be written ({error.strerror}); choose another folder") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / META).is_file():
            build(sources, out, **build_options)
    return out


def _built(sources: Sequence[str]) -> Path | None:
    """The built data set that `sources` is; None for raw text."""
    path = Path(sources[0])
    return path if len(sources) == 1 and (os.path.isfile(path / META) or os.path.isfile(path / SHARD)) else None


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


# --- the folders of a build ------------------------------------------------------------------------------------------


def _check_settings(sources: Sequence[str], settings: Settings, num_proc: int | None, shard: tuple[int, int] | None) -> None:
    if isinstance(sources, str) or not sources:
        raise DataError(f"sources must be a non-empty list of names, got {sources!r}")
    if settings.seq_length < 8:
        raise DataError(f"seq_length must be at least 8, got {settings.seq_length}")
    if settings.vocab_size is not None and settings.vocab_size <= len(SPECIAL_TOKENS):
        raise DataError(f"vocab_size must be above the {len(SPECIAL_TOKENS)} special tokens, got {settings.vocab_size}")
    if settings.tokenizer_sample is not None and settings.tokenizer_sample < 1:
        raise DataError(f"tokenizer_sample must be at least one byte, got {settings.tokenizer_sample}")
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"validation_fraction must lie in [0, 1), got {settings.validation_fraction}")
    if not 0 <= settings.seed < 2**64 or (num_proc is not None and num_proc < 1):
        raise DataError(f"expected 0 <= seed < 2**64 and num_proc >= 1, got seed={settings.seed}, {num_proc=}")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise DataError(f"expected a share i of n with 1 <= i <= n, got {shard[0]}/{shard[1]}")
    inputs = sum(map(is_standard_input, sources))
    if inputs > 1 or (inputs and shard):
        raise DataError("standard input can be read once, by one build: give it once, without --shard")


def _check_vacant(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not ((out / META).is_file() or (out / SHARD).is_file()):
        raise DataError(f"{out}: exists and is not a built data set, so it is never overwritten; choose another folder")
    if not overwrite:
        raise DataError(f"{out}: exists already; choose another folder, or replace it with --overwrite (overwrite=True)")


@contextlib.contextmanager
def _alone(out: Path, overwrite: bool) -> Iterator[None]:
    """Keep other builds of `out` away. Raises DataError where one is at work, or where nothing can be written."""
    try:
        file = out.with_name(f".{out.name}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "w")  # noqa: SIM115, closed below
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise DataError(f"{out}: cannot be written ({getattr(error, 'strerror', error)}); choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(lock.fileno()).st_nlink > 0  # else it was the lock of a build that has just ended
        except BlockingIOError:
            free = False
        except OSError as error:
            raise DataError(f"{out}: its file system has no locks ({error.strerror}); choose another folder") from None
        if not free:
            raise DataError(f"{out}: another process is building it; wait for it, or choose another folder")
        try:
            if _replaced(out).exists() and not out.exists():  # a build was killed between the two renames of _put_in_place
                _replaced(out).rename(out)
            _check_vacant(out, overwrite)
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """The folder of what is finished; what a killed build left is there. Raises DataError for a failed write."""
    staging = out.with_name(f".{out.name}.building")
    try:
        if (staging / "done" / "parts").is_dir():  # a share was about to appear
            (staging / "done" / "parts").rename(staging / "parts")
        (staging / "parts").mkdir(parents=True, exist_ok=True)
        yield staging
    except BaseException as error:
        finished = list(staging.rglob(f"*{parts.SUFFIX}"))
        size = sum(file.stat().st_size for file in finished)
        if size == 0 or (isinstance(error, Exception) and size < KEPT):
            shutil.rmtree(staging, ignore_errors=True)
            kept = "nothing was kept"
        else:
            kept = f"{len(finished)} finished parts are kept in {staging}, and the same command continues with them"
            logger.warning("%s", kept)
        if isinstance(error, OSError):
            raise DataError(f"{out}: writing failed ({error.strerror or error}); {kept}") from error
        raise
    shutil.rmtree(staging, ignore_errors=True)


def _replaced(out: Path) -> Path:
    """Where the former data set waits while a new one takes its place."""
    return out.with_name(f".{out.name}.replaced")


def _put_in_place(done: Path, out: Path) -> None:
    old = _replaced(out)
    if (out / META).is_file() or (out / SHARD).is_file():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(done, out)  # fails if another process created `out` meanwhile
    shutil.rmtree(old, ignore_errors=True)


def _replace(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)


def _spooled(source: str, staging: Path) -> str:
    """Standard input as a file. It cannot be read twice, and is cut into parts like any other."""
    path = staging / f"standard-input{standard_input_kind(source)}"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, CHUNK)
    return str(path)


# --- the steps of a build --------------------------------------------------------------------------------------------


def _train(
    planned: Sequence[Part], source: str, settings: Settings, staging: Path, workers: Workers
) -> PreTrainedTokenizerBase:
    """A tokenizer trained on a sample; that of a killed build of the same text, if it is whole."""
    assert settings.tokenizer_sample and settings.vocab_size and settings.lowercase is not None
    wanted = (settings.tokenizer_sample, settings.vocab_size, settings.lowercase, settings.seq_length, settings.seed)
    pieces = [dataclasses.asdict(piece) for part in planned for piece in part.pieces]
    key = _hash([FORMAT, wanted, settings.text_column, importlib.metadata.version("tokenizers"), pieces])
    folder, note = staging / f"trained-{key[:16]}", staging / "trained.json"
    if note.is_file() and note.read_text() == _hash([key, _all_facts(folder)]):
        logger.info("the tokenizer is that of the build that was stopped")
        return load_tokenizer(str(folder))
    chosen = parts.sample(planned, settings.tokenizer_sample, settings.seed)
    counter, waiting, next_one = WordCounter(settings.lowercase), {}, 0
    count = functools.partial(_count_words, settings)
    with progress("counting words", sum(min(part.size, most) for part, most in chosen)) as shown:
        for number, words in workers.each(count, chosen):
            waiting[number] = words
            while next_one in waiting:  # in the parts' order, whichever process was first
                counter.merge(waiting.pop(next_one))
                next_one += 1
            shown.add(min(chosen[number][0].size, chosen[number][1]))
    if not counter.words:
        raise no_text(source)
    start = time.monotonic()
    tok = train_tokenizer(counter.words, settings.vocab_size, settings.lowercase, settings.seq_length)
    if sum(part.size for part in planned) > FORECAST:
        sampled = f"{human(sum(min(part.size, most) for part, most in chosen))}B of {human(sum(p.size for p in planned))}B"
        logger.info("tokenizer: %d words, trained on %s of text in %s", len(tok), sampled, duration(time.monotonic() - start))
    _replace(tok, folder)
    note.write_text(_hash([key, _all_facts(folder)]))
    return load_tokenizer(str(folder))  # as a build that goes on would


def _count_words(settings: Settings, task: tuple[Part, int]) -> dict[str, int]:
    assert settings.lowercase is not None
    return parts.count_words(task[0], settings.text_column, settings.lowercase, task[1])


def _forecast(
    mine: Sequence[Part], job: Job, settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: int, packs: bool
) -> None:
    """Say how long the build will take and how much room it needs. Raises DataError where there is too little room."""
    left = [part for part in mine if not job.file(part).exists()]
    size = sum(part.size for part in left)
    if len(left) < len(mine):
        logger.info("%d of %d parts are finished already", len(mine) - len(left), len(mine))
    if size < FORECAST:
        return
    encoder, text, tokens, documents, rate = Encoder(tokenizer), 0, 0, 0, 1.0
    for part in left[:: max(1, len(left) // 4)][:4]:
        start, before = time.process_time(), text
        for batch in parts.batches(part, settings.text_column):
            texts = [document for document in batch if isinstance(document, str)]
            ids = encoder(texts)[0] if texts else np.concatenate(batch)
            text += sum(len(document.encode()) for document in texts) or 4 * len(ids)  # about four bytes of text a token
            tokens, documents = tokens + len(ids), documents + len(batch)
            if text - before > parts.BATCH:
                break
        rate = (text - before) / max(time.process_time() - start, 1e-3)  # the last one's: the first ones bring many new words
    width = id_type(tokenizer).itemsize
    result = size * (tokens * width * settings.seq_length / (settings.seq_length - 2)) / max(text, 1)
    work = size * (tokens * width + documents * (12 + width)) / max(text, 1)
    need = work + result if packs else work
    logger.info(
        "%sB of text in %d parts, by %d processes: at most about %s; %sB of disk while it builds%s",
        human(size),
        len(left),
        processes,
        duration(size / rate / min(processes, len(left))),
        human(need),
        f", {human(result)}B in the end" if packs else "",
    )
    free = shutil.disk_usage(job.folder).free
    if need > free:
        raise DataError(
            f"{job.folder.parent.parent}: the build needs about {human(need)}B, and {human(free)}B are free; make room, choose "
            "another --out, or build shares on several disks (--shard)"
        )


def _forget_others(mine: Sequence[Part], job: Job) -> None:
    """Delete what a killed build left of other text or of another tokenizer, or half-written."""
    wanted = {job.file(part).name for part in mine}
    for left in job.folder.iterdir():
        if left.name not in wanted:
            left.unlink()


def _tokenize(mine: Sequence[Part], job: Job, workers: Workers) -> list[Finished]:
    facts: dict[int, Facts] = {}
    with progress("tokenizing", sum(part.size for part in mine)) as shown:
        for number, found in workers.each(functools.partial(parts.tokenize, job), mine):
            facts[number] = found
            shown.add(mine[number].size or found.text)
    return [Finished(part.number, part.source, job.file(part), facts[i]) for i, part in enumerate(mine)]


def _pack(
    finished: Sequence[Finished],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    sources: list[str],
    staging: Path,
    workers: Workers,
) -> None:
    """Write the data set of these parts to the folder `done`, `meta.json` last."""
    for number, source in enumerate(sources):
        if not any(part.facts.documents for part in finished if part.source == number):
            raise no_text(source)
    done = staging / "done"
    shutil.rmtree(done, ignore_errors=True)
    for split in rows.SPLITS:
        (done / split).mkdir(parents=True)
    shutil.copytree(staging / "tokenizer", done / "tokenizer")

    ids, files = special_ids(tokenizer), [part.file for part in finished]
    dropped = duplicates(files) if settings.dedup else [np.empty(0, dtype=bool)] * len(files)
    chosen = hold_out(files, dropped, settings.validation_fraction, settings.seq_length)
    layout = rows.Layout(settings.seq_length, ids, id_type(tokenizer).name, chosen)
    shares = [rows.Share(file, gone) for file, gone in zip(files, dropped, strict=True)]
    sizes = [rows.measure(chosen, share) for share in shares]
    wanted = rows.plan(done, shares, sizes, layout)
    written: dict[int, rows.Written] = {}
    with progress("packing", sum(file.last - file.first for file in wanted), " rows") as shown:
        for number, facts in workers.each(functools.partial(rows.write, layout), wanted):
            written[number] = facts
            shown.add(wanted[number].last - wanted[number].first)

    vocabulary = json.dumps([FORMAT, settings.seq_length, ids, sorted(tokenizer.get_vocab().items())])
    fingerprint = hashlib.sha256(vocabulary.encode())
    counts = {}
    for number, split in enumerate(rows.SPLITS):
        of_split = [i for i, file in enumerate(wanted) if file.validation == bool(number)]
        fingerprint.update(hashlib.sha256(b"".join(written[i].rows_sha256 for i in of_split)).digest())
        counts[f"{split}_rows"] = wanted[of_split[-1]].last
        counts[f"{split}_tokens"] = sum(size[number].tokens for size in sizes)
    unknown = sum(facts.unknown for facts in written.values())
    facts_of = {str(file.path.relative_to(done)): written[i].file for i, file in enumerate(wanted)}
    meta = Meta(
        format=FORMAT,
        fingerprint=fingerprint.hexdigest(),
        vocab_size=len(tokenizer),
        special_ids=ids,
        documents=sum(part.facts.documents for part in finished),
        duplicates=sum(int(np.count_nonzero(gone)) for gone in dropped),
        text_bytes=sum(part.facts.text for part in finished),
        unknown_share=unknown / (counts["train_tokens"] + counts["validation_tokens"]),
        sources=sources,
        versions={name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers")},
        files=dict(sorted({**facts_of, **_all_facts(done / "tokenizer", "tokenizer/")}.items())),
        seq_length=settings.seq_length,
        settings={name: value for name, value in dataclasses.asdict(settings).items() if name != "seq_length"},
        **counts,
    )
    (done / META).write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n", encoding="utf-8")


def _all_facts(folder: Path, before: str = "") -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {before + str(path.relative_to(folder)): rows.file_facts(path) for path in found}


# --- shares of a build -----------------------------------------------------------------------------------------------


def _finish_share(
    finished: Sequence[Finished],
    planned: Sequence[Part],
    settings: Settings,
    sources: list[str],
    tokenizer_digest: str,
    shard: tuple[int, int],
    staging: Path,
) -> None:
    """Put this machine's parts into the folder `done`, `shard.json` last."""
    done = staging / "done"
    shutil.rmtree(done, ignore_errors=True)
    done.mkdir()
    shutil.copytree(staging / "tokenizer", done / "tokenizer")
    # Machines may know the text by other paths, and a copy has other times.
    pieces = [(part.number, p.label, p.start, p.stop, p.size) for part in planned for p in part.pieces]
    same = {**dataclasses.asdict(settings), "tokenizer": tokenizer_digest}
    content = {
        "format": FORMAT,
        "build": _hash([FORMAT, same, pieces, shard[1]]),
        "share": shard[0],
        "of": shard[1],
        "settings": dataclasses.asdict(settings),
        "sources": sources,
        "parts": [
            {"number": part.number, "source": part.source, "file": part.file.name, "facts": dataclasses.asdict(part.facts)}
            for part in finished
        ],
    }
    os.rename(staging / "parts", done / "parts")
    (done / SHARD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_share(folder: Path) -> dict[str, Any]:
    file = folder / SHARD
    if not file.is_file():
        raise DataError(f"{folder}: not a share of a build (no {SHARD}); `python -m sctd_ds.data build --shard i/n` makes one")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{folder}: format {content['format']}, but this version merges {FORMAT}; build the share again")
        return content
    except DataError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{file}: damaged ({error}); build the share again") from None
