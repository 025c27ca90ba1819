"""Building a packed data set from text, and loading it.

A built folder holds `train/` and `validation/` (Arrow, read memory-mapped), `tokenizer/` and `meta.json`.
`meta.json` is written last and lists every file; `load` refuses a folder that lacks it or disagrees with it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sctd_ds.data.sources import META, DataError, cut, documents, identity, size

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALPHABET = 1000  # a trained vocabulary spells this many characters, the most frequent ones; BERT's own trainer has this limit
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges*", "*.model")  # files of any type of tokenizer
COUNTED = 20_000  # training rows that decide how frequent words are
_HOW_TO_START = (
    "`python -m sctd_ds.data build my.txt --out {}` builds a data set from your text; `--data python-docs` trains at once, on "
    "English that Python contains"
)
BATCH_BYTES = 1 << 24  # of text or tokens processed at a time


@dataclasses.dataclass(frozen=True)
class Meta:
    """Description of a built data set, stored as its `meta.json`.

    `fingerprint` is a hash of the tokenizer and of every row: the same text, tokenizer and settings
    give the same fingerprint on any machine. Token counts exclude special tokens and separators.
    `files` maps each file to its size in bytes and its SHA-256.
    """

    format: int
    fingerprint: str
    seq_length: int
    vocab_size: int
    special_ids: dict[str, int]
    documents: int
    train_rows: int
    validation_rows: int
    train_tokens: int
    validation_tokens: int
    unknown_share: float
    sources: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class PackedData:
    """A built data set: `train` and `validation` rows hold `input_ids`, int32 [seq_length]."""

    path: Path
    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    meta: Meta


def build(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 30522,
    lowercase: bool = True,
    seq_length: int = 512,
    validation_fraction: float = 0.01,
    seed: int = 0,
    text_column: str = "text",
    num_proc: int = 1,
    overwrite: bool = False,
) -> Path:
    """Tokenize text and pack it into full rows on disk.

    Packing: the documents of a split are joined into one stream with [SEP] between them; the stream is cut every
    `seq_length - 2` tokens, and each piece is enclosed in [CLS] and [SEP]. A row may therefore begin or end inside a
    document. No token is lost, and only the last row of a split is padded.

    Validation is held out by document, in the order of a hash of (seed, text), until the documents fill the requested
    share and at least one row. Equal texts go to the same split, so no text is in both.

    Args:
        sources: `.txt`, `.jsonl`, `.json` (each also `.gz`), `.parquet`, folders of them, a Hub data set
            `owner/name[:config]` (its train split), or "python-docs[:2MB]", English text from the Python installation,
            of at most that size.
        out: the folder to write. It appears complete or not at all.
        tokenizer: folder or name of an existing tokenizer; None trains a WordPiece vocabulary on the text.
        vocab_size, lowercase: of a trained tokenizer. A small text gives a smaller vocabulary.
        seq_length: tokens per row, special tokens included.
        validation_fraction: of all tokens, in [0, 1).
        text_column: the column of a record that holds the text.
        num_proc: processes that tokenize; 1 already uses all cores, as `tokenizers` is parallel.
        overwrite: replace a data set built earlier at `out`; `build` never replaces anything else.

    Returns:
        `out`.

    Raises:
        DataError: a source, the tokenizer, a setting or `out` is unusable; nothing is left behind.
    """
    out = Path(out)
    # Fail early: a bad setting, source or tokenizer must not show only after hours of reading.
    _check_settings(sources, out, vocab_size, seq_length, validation_fraction, seed, num_proc, overwrite)
    for source in sources:
        identity(source)
    given = _load_tokenizer(tokenizer) if tokenizer else None

    # Write to a private folder beside `out`, and rename it when it is complete.
    with _alone(out), _staging(out) as staging:
        with _progress_bars_on_terminals_only(), tempfile.TemporaryDirectory(prefix="work.", dir=staging) as work:
            texts = _read(sources, text_column, seed, Path(work))
            tok = given or _train_tokenizer(texts, vocab_size, lowercase, seq_length)
            tok.save_pretrained(staging / "tokenizer")
            tokenized = _tokenize(texts, tok, num_proc, Path(work))
            held_out = _hold_out(tokenized, validation_fraction, seq_length)
            facts = _pack(tokenized, held_out, tok, seq_length, Path(work), staging)
        settings = {
            "tokenizer": tokenizer,
            "lowercase": lowercase if tokenizer is None else None,
            "vocab_size": vocab_size if tokenizer is None else None,
            "validation_fraction": validation_fraction,
            "seed": seed,
            "text_column": text_column,
        }
        meta = Meta(
            format=FORMAT,
            seq_length=seq_length,
            vocab_size=len(tok),
            special_ids=_special_ids(tok),
            documents=len(texts),
            sources=list(sources),
            settings=settings,
            versions={name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers")},
            files={str(path.relative_to(staging)): _file_facts(path) for path in _regular_files(staging)},
            **facts,
        )
        (staging / META).write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n", encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp's folders are private
        _put_in_place(staging, out, overwrite)
    return out


def load(path: str | Path, *, seq_length: int | None = None, verify: bool = False) -> PackedData:
    """Open a built data set, memory-mapped.

    This compares every file's size with `meta.json`, and the SHA-256 of all but the Arrow files; `verify` includes those and
    reads all of them.

    Raises:
        DataError: not a built data set, incomplete, altered, or built for another `seq_length`.
    """
    from datasets import load_from_disk

    path = Path(path)
    meta = _read_meta(path)
    if seq_length is not None:
        _check_length(path, meta, seq_length)
    with ThreadPoolExecutor() as threads:  # one hashes less than a disk delivers
        list(threads.map(lambda name: _check_file(path, meta, name, verify), meta.files))
    return PackedData(
        path=path,
        train=load_from_disk(str(path / "train")),
        validation=load_from_disk(str(path / "validation")),
        tokenizer=_load_tokenizer(str(path / "tokenizer")),
        meta=meta,
    )


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
        meta = _read_meta(built)
        _check_length(built, meta, seq_length)
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
        _load_tokenizer(tokenizer)


def unigram_loss(packed: PackedData, validation_rows: int) -> float | None:
    """Cross-entropy of the validation words under the frequencies of the training words, in nats per token.

    This is the loss of a model that knows no more than how frequent words are. At most COUNTED training rows are counted,
    evenly spread. None without validation rows.
    """
    if not len(packed.validation):
        return None
    step = -(-len(packed.train) // COUNTED)
    train, validation = (
        np.concatenate(rows.with_format("numpy")[:stop:every]["input_ids"], axis=None)
        for rows, stop, every in ((packed.train, None, step), (packed.validation, validation_rows, None))
    )
    words = np.ones(len(packed.tokenizer), dtype=bool)
    words[list(packed.tokenizer.all_special_ids)] = False
    counts = (np.bincount(train, minlength=len(words)) + 1.0) * words  # plus one: a validation word may be new
    return float(np.log(counts.sum()) - np.log(counts[validation[words[validation]]]).mean())


def check_tokenizer(packed: PackedData, name: str) -> None:
    """Raise DataError unless the rows were made with the tokenizer `name` (a folder or Hub name).

    Another tokenizer's ids would stand for other words.
    """
    used, wanted = packed.tokenizer, _load_tokenizer(name)

    def essence(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        return [tokenizer.get_vocab(), _special_ids(tokenizer), parts["normalizer"], parts["pre_tokenizer"]]

    if essence(used) != essence(wanted):
        sizes = "" if len(used) == len(wanted) else f" ({len(used)} ids, not {len(wanted)})"
        raise DataError(
            f"{packed.path}: built with another tokenizer than that of {name}{sizes}; build it again with "
            f"--tokenizer {name}, or give pretrain.py the text"
        )


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
    tokenizer = options.get("tokenizer")
    if tokenizer and Path(tokenizer).is_dir():  # its content identifies it; a model in the same folder does not matter
        files = sorted({file for pattern in TOKENIZER_FILES for file in Path(tokenizer).glob(pattern)})
        options["tokenizer"] = [(file.name, _file_facts(file)) for file in files]
    key = json.dumps([FORMAT, identities, sorted(options.items())], default=str)
    out = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:16]
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
    return path if len(sources) == 1 and os.path.isfile(path / META) else None


# --- the steps of build ----------------------------------------------------------------------------------------------


def _check_settings(
    sources: Sequence[str],
    out: Path,
    vocab_size: int,
    seq_length: int,
    validation_fraction: float,
    seed: int,
    num_proc: int,
    overwrite: bool,
) -> None:
    if isinstance(sources, str) or not sources:
        raise DataError(f"sources must be a non-empty list of names, got {sources!r}")
    if seq_length < 8:
        raise DataError(f"seq_length must be at least 8, got {seq_length}")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise DataError(f"vocab_size must be above the {len(SPECIAL_TOKENS)} special tokens, got {vocab_size}")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction must lie in [0, 1), got {validation_fraction}")
    if seed < 0 or num_proc < 1:
        raise DataError(f"expected seed >= 0 and num_proc >= 1, got {seed=}, {num_proc=}")
    _check_vacant(out, overwrite)


def _check_vacant(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / META).is_file():
        raise DataError(f"{out}: exists and is not a built data set, so it is never overwritten; choose another folder")
    if not overwrite:
        raise DataError(f"{out}: exists already; choose another folder, or replace it with --overwrite (overwrite=True)")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
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
        if not free:
            raise DataError(f"{out}: another process is building it; wait for it, or choose another folder")
        try:
            yield
        finally:
            file.unlink()


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A private folder beside `out`, deleted in the end, as are those of killed builds. Raises DataError for a failed write."""
    private = f".{out.name}.building."
    try:
        for left in out.parent.glob(f"{glob.escape(private)}*"):
            # A kill between the two renames of `_put_in_place` leaves the only copy in such a folder.
            if out.exists() or not (left / META).is_file():
                shutil.rmtree(left)
        staging = Path(tempfile.mkdtemp(prefix=private, dir=out.parent))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out}: writing failed ({error.strerror or error}); nothing was kept") from error


def _put_in_place(staging: Path, out: Path, overwrite: bool) -> None:
    if not (overwrite and (out / META).is_file()):
        os.rename(staging, out)  # fails if another process created `out` meanwhile
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.building.", dir=out.parent))
    os.rename(out, old)
    try:
        os.rename(staging, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _progress_bars_on_terminals_only() -> Iterator[None]:
    """Our own bars check for a terminal (disable=None); this switches those of `datasets` off where there is none."""
    import datasets

    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


def _read(sources: Sequence[str], text_column: str, seed: int, work: Path) -> datasets.Dataset:
    """All documents as Arrow: `text`, and `key`, the hash that decides which documents are held out."""
    from datasets import Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    path = str(work / "documents.arrow")
    features = Features({"text": Value("large_string"), "key": Value("int64")})
    salt = seed.to_bytes(8, "little")
    pending: dict[str, list] = {"text": [], "key": []}
    held = 0
    with (
        ArrowWriter(features=features, path=path) as writer,
        tqdm(desc="reading", total=sum(map(size, sources)) or None, unit="B", unit_scale=True, disable=None) as progress,
    ):
        for source in sources:
            for text in documents(source, text_column):
                data = text.encode()
                key = hashlib.blake2b(data, digest_size=8, salt=salt).digest()
                pending["text"].append(text)
                pending["key"].append(int.from_bytes(key, "little", signed=True))
                progress.update(len(data))
                held += len(data)
                if held >= BATCH_BYTES:
                    writer.write_batch(pending)
                    pending, held = {"text": [], "key": []}, 0
        writer.write_batch(pending)
        writer.finalize()
    return Dataset.from_file(path)


def _batch_size(rows: datasets.Dataset) -> int:
    """The number of rows in about BATCH_BYTES."""
    return max(1, min(10_000, len(rows) * BATCH_BYTES // max(1, rows.data.nbytes)))


def _texts(texts: datasets.Dataset) -> Iterator[list[str]]:
    for batch in texts.select_columns("text").iter(batch_size=_batch_size(texts)):
        yield batch["text"]


def _train_tokenizer(texts: datasets.Dataset, vocab_size: int, lowercase: bool, seq_length: int) -> PreTrainedTokenizerBase:
    """WordPiece over BERT's normalizer and pre-tokenizer, with the same vocabulary in every run.

    The trainer numbers symbols in the order of a hash map whose seed differs between processes, and breaks ties between
    merges by these numbers. So it receives all its initial symbols in a fixed order: characters, and their "##" forms.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    counts: collections.Counter[str] = collections.Counter()
    for batch in tqdm(_texts(texts), desc="characters", unit="batch", disable=None):
        counts.update(model.normalizer.normalize_str("\n".join(batch)))
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:ALPHABET]
    continuing = ["##" + c for c in sorted(characters) if len(model.pre_tokenizer.pre_tokenize_str("a" + c)) == 1]
    least = len(SPECIAL_TOKENS) + len(characters) + len(continuing)
    if vocab_size < least:
        raise DataError(f"vocab_size {vocab_size} is too small for the characters of this text; give at least {least}")

    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + continuing,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=sys.stderr.isatty(),
    )
    model.train_from_iterator(_texts(texts), trainer, length=len(texts))
    return BertTokenizer(vocab=model.get_vocab(), do_lower_case=lowercase, model_max_length=seq_length)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer with all five special tokens. If `name` is a folder, the network is not used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).exists(), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: cannot be loaded as a tokenizer ({reason}); give a folder or a Hub name") from None
    if not tokenizer.is_fast:
        raise DataError(f"{name}: only fast tokenizers (tokenizer.json) are supported, got {type(tokenizer).__name__}")
    if missing := [name for name, token_id in _special_ids(tokenizer).items() if token_id is None]:
        raise DataError(f"{name}: the tokenizer has no {', '.join(missing)} token; masked-LM training needs all five")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers' result for a folder without a tokenizer
        raise DataError(f"{name}: the tokenizer has no vocabulary; is its tokenizer.json missing?")
    return tokenizer


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")}


def _tokenize(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int, work: Path) -> datasets.Dataset:
    """Columns `ids` (int32, without special tokens), `length` (their number) and `key` (the document's)."""
    from datasets import Features, List, Value

    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def encode(batch: dict[str, list]) -> dict[str, list]:
        backend.encode_special_tokens = True  # "[MASK]" in a text is text; set here because pickling loses the setting
        # Long documents are encoded in pieces, 256 at a time: encodings need far more memory than their ids.
        pieces = [list(cut(text)) for text in batch["text"]]
        flat = [piece for document in pieces for piece in document]
        encoded = iter(
            encoding.ids
            for start in range(0, len(flat), 256)
            for encoding in backend.encode_batch_fast(flat[start : start + 256], add_special_tokens=False)
        )
        ids = [np.concatenate([np.array(next(encoded), dtype=np.int32) for _ in document]) for document in pieces]
        return {"ids": ids, "length": [len(document) for document in ids]}

    return texts.map(
        encode,
        batched=True,
        batch_size=_batch_size(texts),
        remove_columns=["text"],
        features=Features({"key": Value("int64"), "ids": List(Value("int32")), "length": Value("int64")}),
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(work / "tokens.arrow"),
        new_fingerprint="tokens",
        desc="tokenizing",
    )


def _hold_out(tokenized: datasets.Dataset, fraction: float, seq_length: int) -> np.ndarray:
    """Which documents are held out for validation: bool [documents]."""
    columns = tokenized.select_columns(["key", "length"]).with_format("numpy")[:]
    key, length = columns["key"], columns["length"]
    total, row = int(length.sum()), seq_length - 2
    wanted = max(fraction * total, row)
    order = np.lexsort((key, length > wanted))  # documents longer than the whole validation split come last
    filled = np.searchsorted(np.cumsum(length[order]), wanted)
    held_out = np.isin(key, key[order[: filled + 1]])
    if filled == len(order) or length[~held_out].sum() < row:
        raise DataError(
            f"too little text: {total} tokens in {len(length)} documents do not fill one training and one validation row "
            f"of {seq_length}; give more text (blank lines separate documents), or a smaller seq_length"
        )
    return held_out


class _Packer:
    """Cuts one split's stream of tokens into rows and writes them."""

    def __init__(self, path: Path, ids: dict[str, int], seq_length: int):
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        self.path, self.ids, self.seq_length = path, ids, seq_length
        self.writer = ArrowWriter(features=Features({"input_ids": List(Value("int32"), length=seq_length)}), path=str(path))
        self.digest = hashlib.sha256()
        self.pending = np.empty(0, dtype=np.int32)
        self.rows = self.tokens = self.unknown = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens end to end, and the number of tokens of each."""
        self.tokens += len(tokens)
        self.unknown += int(np.count_nonzero(tokens == self.ids["unk"]))
        starts = np.cumsum(lengths) - lengths
        first = self.rows == 0 and len(self.pending) == 0
        stream = np.insert(tokens, starts[1:] if first else starts, self.ids["sep"])
        stream = np.concatenate([self.pending, stream])
        whole = len(stream) // (self.seq_length - 2) * (self.seq_length - 2)
        if whole:
            self._write(stream[:whole])
        self.pending = stream[whole:]

    def close(self) -> None:
        if len(self.pending):
            self._write(self.pending)
        self.writer.finalize()

    def _write(self, stream: np.ndarray) -> None:
        """Write a stream as rows; only a stream shorter than one row is padded."""
        import pyarrow

        width = self.seq_length - 2
        rows = np.full((-(-len(stream) // width), self.seq_length), self.ids["pad"], dtype="<i4")
        rows[:, 0] = self.ids["cls"]
        rows[:, 1 : 1 + min(width, len(stream))] = stream.reshape(len(rows), -1)
        rows[:, 1 + min(width, len(stream))] = self.ids["sep"]
        self.writer.write_table(
            pyarrow.table({"input_ids": pyarrow.FixedSizeListArray.from_arrays(rows.ravel(), self.seq_length)})
        )
        self.digest.update(rows.tobytes())
        self.rows += len(rows)


def _pack(
    tokenized: datasets.Dataset,
    held_out: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    work: Path,
    staging: Path,
) -> dict[str, Any]:
    """Write both splits in the documents' order; returns the counts and the fingerprint of `Meta`."""
    from datasets import Dataset

    ids = _special_ids(tokenizer)
    packers = [_Packer(work / f"{split}.arrow", ids, seq_length) for split in ("train", "validation")]
    start = 0
    batches = tokenized.with_format("arrow").iter(batch_size=_batch_size(tokenized))
    for table in tqdm(batches, desc="packing", unit="batch", disable=None):
        lengths = table["length"].to_numpy()
        tokens = table["ids"].combine_chunks().flatten().to_numpy()
        in_validation = held_out[start : start + len(lengths)]
        start += len(lengths)
        for packer, chosen in zip(packers, (~in_validation, in_validation), strict=True):
            chosen = chosen & (lengths > 0)
            if chosen.any():
                packer.add(tokens[np.repeat(chosen, lengths)], lengths[chosen])
    for packer, split in zip(packers, ("train", "validation"), strict=True):
        packer.close()
        Dataset.from_file(str(packer.path)).save_to_disk(str(staging / split))
    train, validation = packers
    vocabulary = json.dumps([FORMAT, seq_length, ids, sorted(tokenizer.get_vocab().items())])
    fingerprint = hashlib.sha256(vocabulary.encode() + train.digest.digest() + validation.digest.digest())
    return {
        "fingerprint": fingerprint.hexdigest(),
        "train_rows": train.rows,
        "validation_rows": validation.rows,
        "train_tokens": train.tokens,
        "validation_tokens": validation.tokens,
        "unknown_share": (train.unknown + validation.unknown) / (train.tokens + validation.tokens),
    }


# --- files -----------------------------------------------------------------------------------------------------------


def _regular_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_facts(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, meta: Meta, name: str, verify: bool) -> None:
    """DataError unless a file of a built data set is there as it was written; see `load`."""
    file, facts = path / name, meta.files[name]
    if not file.is_file():
        raise DataError(f"{path}: {name} is missing, so the data set is incomplete; delete the folder, and build it again")
    hashed = verify or file.suffix != ".arrow"
    try:
        same = file.stat().st_size == facts[0] and (not hashed or _file_facts(file) == facts)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    if not same:
        raise DataError(
            f"{path}: {name} has changed since it was built (damaged or edited); delete the folder, and build it again"
        )


def _read_meta(path: Path) -> Meta:
    file = path / META
    if not file.is_file():
        raise DataError(f"{path}: not a built data set (no {META}); build one with `python -m sctd_ds.data build`")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["files"] = {name: (size, digest) for name, (size, digest) in fields["files"].items()}
        meta = Meta(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: damaged ({error}); build the data set again") from None
    if meta.format != FORMAT:
        raise DataError(f"{path}: format {meta.format}, but this version reads {FORMAT}; build the data set again")
    return meta


def _check_length(path: Path, meta: Meta, seq_length: int) -> None:
    if meta.seq_length != seq_length:
        raise DataError(
            f"{path}: built for seq_length {meta.seq_length}, but seq_length {seq_length} was requested; "
            f"build it again with --seq-length {seq_length}, or train with {meta.seq_length}"
        )
