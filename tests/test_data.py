"""Data: no token is lost, masks and order are functions of (seed, epoch, row), and bad input gets one clear line."""

import builtins
import collections
import csv
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from benchmarks import data as benchmark
from sctd_ds import data
from sctd_ds.data import DataError, Loader, Masker, builder, parts, rows, sources, split, validation_batches, workers
from sctd_ds.data.__main__ import main
from sctd_ds.data.readers import BLOCK, cut
from sctd_ds.data.sources import documents
from sctd_ds.data.tokenizer import Encoder, WordCounter, id_type

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Local sources must not reach for the network, not even to fail there."""
    connect = socket.socket.connect

    def guarded(self, address):
        assert self.family == socket.AF_UNIX, f"tried to connect to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 120 made-up words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 120))) for _ in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def texts():
    return make_texts(400)


@pytest.fixture(scope="module")
def built(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("built")
    return data.build([str(write_jsonl(folder / "a.jsonl", texts))], folder / "out", vocab_size=300, seq_length=32)


@pytest.fixture(scope="module")
def packed(built):
    return data.load(built, seq_length=32, verify=True)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(995)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def make_rows(count: int, seq_length: int = 16, padded: int = 0, vocab_size: int = 1000) -> Dataset:
    """Rows [CLS] words [SEP]; the last one has `padded` pads."""
    rows = np.random.default_rng(0).integers(5, vocab_size, (count, seq_length))
    rows[:, 0], rows[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
    if padded:
        rows[-1, -padded - 1] = SPECIAL["sep"]
        rows[-1, -padded:] = SPECIAL["pad"]
    return Dataset.from_dict({"input_ids": rows.tolist()})


# --- building --------------------------------------------------------------------------------------------------------


def stream_of(rows: np.ndarray) -> np.ndarray:
    """The tokens of packed rows end to end, frames and padding taken off; checks the frames on the way."""
    assert (rows[:, 0] == SPECIAL["cls"]).all()
    assert (rows[:-1, -1] == SPECIAL["sep"]).all() and (rows[:-1] != SPECIAL["pad"]).all()
    last = rows[-1][rows[-1] != SPECIAL["pad"]]
    assert last[-1] == SPECIAL["sep"] and (rows[-1, len(last) :] == SPECIAL["pad"]).all()
    return np.concatenate([rows[:-1, 1:-1].ravel(), last[1:-1]])


def split_documents(stream: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(stream[stream != SPECIAL["sep"]], boundaries(stream))]


def boundaries(stream: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(stream == SPECIAL["sep"])
    return at - np.arange(len(at))


def test_no_token_is_lost_and_no_document_is_in_both_splits(packed, texts):
    train, validation = (split_documents(stream_of(np.array(rows["input_ids"]))) for rows in (packed.train, packed.validation))
    expected = packed.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert len(train) + len(validation) == len(expected)
    sides = {"train": iter([*train, None]), "validation": iter([*validation, None])}
    heads = {name: next(side) for name, side in sides.items()}
    for document in expected:  # both splits keep the documents' order
        name = next(name for name, head in heads.items() if head == document)
        heads[name] = next(sides[name])
    assert heads == {"train": None, "validation": None}


def test_meta_counts_what_is_there(packed, texts):
    meta = packed.meta
    tokens = sum(map(len, packed.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    assert meta.train_tokens + meta.validation_tokens == tokens
    assert (meta.train_rows, meta.validation_rows) == (len(packed.train), len(packed.validation))
    assert meta.documents == len(texts) and meta.vocab_size == len(packed.tokenizer) and meta.special_ids == SPECIAL
    assert 0.01 <= meta.validation_tokens / tokens < 0.03
    assert meta.unknown_share == 0.0


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 11)),
    seq_length=st.integers(8, 12),
)
def test_packing_joins_documents_with_separators_whatever_the_batches(tmp_path_factory, lengths, cuts, seq_length):
    docs = [list(range(100 * i + 5, 100 * i + 5 + n)) for i, n in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("rows")
    edges = [0, *sorted(c for c in cuts if c < len(docs)), len(docs)]
    files = [
        write_part(folder / f"{first}.part", docs[first:last], range(first, last)) for first, last in itertools.pairwise(edges)
    ]
    held_out = split.HoldOut(short=100, last=len(docs) // 3 - 1, longer=False)  # the first third
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SHARD", 3 * seq_length * 2)
        train, validation = packed_rows(folder, files, held_out, seq_length)
    for found, wanted in ((train, docs[len(docs) // 3 :]), (validation, docs[: len(docs) // 3])):
        assert (split_documents(stream_of(found)) if len(found) else []) == wanted


def write_part(path, docs: list[list[int]], keys) -> Path:
    """A part's file with documents of these ids and keys."""
    tokens = [token for document in docs for token in (SPECIAL["sep"], *document)]
    arrays = {"tokens": np.array(tokens, dtype=np.uint16), "lengths": np.array([len(d) for d in docs], dtype=np.uint32)}
    parts._write(path, arrays | {"keys": np.array(keys, dtype=np.int64)}, len(docs), 0)
    return path


def packed_rows(folder, files, held_out, seq_length) -> list[np.ndarray]:
    """The rows of train and validation, as the files of rows hold them."""
    shares = [rows.Share(file, np.empty(0, dtype=bool)) for file in files]
    layout = rows.Layout(seq_length, SPECIAL, "uint16", held_out)
    found = [[], []]
    for name in rows.SPLITS:
        (folder / name).mkdir()
    for file in rows.plan(folder, shares, [rows.measure(held_out, share) for share in shares], layout):
        rows.write(layout, file)
        found[file.validation] += Dataset.from_file(str(file.path))["input_ids"]
        assert len(Dataset.from_file(str(file.path))) == file.last - file.first <= 3
    return [np.array(part) for part in found]


def test_equal_texts_are_held_out_together(tmp_path):
    texts = make_texts(60, seed=1)
    source = write_jsonl(tmp_path / "a.jsonl", texts * 3)
    out = data.build([str(source)], tmp_path / "out", vocab_size=300, seq_length=32, validation_fraction=0.3)
    packed = data.load(out)
    train, validation = (
        {tuple(d) for d in split_documents(stream_of(np.array(rows["input_ids"])))}
        for rows in (packed.train, packed.validation)
    )
    assert len(train) + len(validation) == 60 and not train & validation


def test_fingerprint_is_the_same_in_another_process_and_another_place(built, texts, tmp_path):
    source = write_jsonl(tmp_path / "moved.jsonl", texts)
    options = ["--vocab-size", "300", "--seq-length", "32"]
    command = [sys.executable, "-m", "sctd_ds.data", "build", str(source), "--out", str(tmp_path / "o"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = data.load(built), data.load(tmp_path / "o", verify=True)
    assert first.meta.fingerprint == second.meta.fingerprint
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert second.meta.fingerprint[:16] in done.stdout and "it/s" not in done.stderr


def test_help_names_no_default_of_cased(capsys):
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "keeps case and accents --tokenizer-sample" in text


@pytest.mark.parametrize("option", [{"seed": 1}, {"seq_length": 48}, {"lowercase": False}, {"vocab_size": 200}])
def test_fingerprint_tells_settings_apart(built, texts, tmp_path, option):
    source = write_jsonl(tmp_path / "a.jsonl", [*texts[:-1], texts[-1].upper()])
    base = {"vocab_size": 300, "seq_length": 32}
    out = [data.build([str(source)], tmp_path / name, **base | o) for name, o in (("a", {}), ("b", option))]
    assert data.load(out[0]).meta.fingerprint != data.load(out[1]).meta.fingerprint


def test_every_kind_of_source_gives_the_same_documents(texts, tmp_path):
    body = "\r\n\r\n".join(texts)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + body.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(body.replace("\r\n\r\n", "\n \t\n\n").encode()))
    write_jsonl(tmp_path / "c.jsonl", texts)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    (tmp_path / "e.json").write_text(json.dumps([{"text": text, "id": 1} for text in texts], indent=1))
    (tmp_path / "f.json").write_bytes((tmp_path / "c.jsonl").read_bytes())
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), tmp_path / "g.parquet")
    (tmp_path / "h.jsonl.zst").write_bytes(compressed := pa.compress((tmp_path / "c.jsonl").read_bytes(), "zstd", asbytes=True))
    (tmp_path / "i.txt.xz").write_bytes(lzma.compress(body.encode()))
    for name, delimiter in (("j.csv", ","), ("k.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    assert len(compressed) < (tmp_path / "c.jsonl").stat().st_size
    files = sorted(tmp_path.iterdir())
    assert len(files) == 11
    for file in files:
        assert list(documents(str(file), "text")) == texts, file
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "l")
    assert list(documents(str(tmp_path / "l"), "text")) == texts
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert list(documents(str(tmp_path), "text")) == texts * 12


def test_characters_across_read_chunks_survive(tmp_path, monkeypatch):
    monkeypatch.setattr("sctd_ds.data.files.CHUNK", 7)
    texts = ["grüße aus köln, 你好 🙂🙂", "zweiter absatz\nmit zeile"]
    (tmp_path / "a.txt").write_bytes("\r\n\r\n".join(texts).replace("\nmit", "\r\nmit").encode("utf-8-sig"))
    assert list(documents(str(tmp_path / "a.txt"), "text")) == texts


@pytest.mark.parametrize("separator", [" ", ""])
def test_one_gigantic_line_is_cut_without_losing_anything(tmp_path, separator):
    line = separator.join(make_texts(1, seed=3) * (30_000_000 // 500))[:30_000_000]
    (tmp_path / "a.txt").write_text(line)
    pieces = list(documents(str(tmp_path / "a.txt"), "text"))
    assert max(map(len, pieces)) <= BLOCK
    assert "".join(pieces).replace(" ", "") == line.replace(" ", "")
    if separator:
        assert " ".join(pieces).split() == line.split()  # and no word is cut


def test_gigantic_line_builds(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(make_texts(10_000)))
    packed = data.load(data.build([str(tmp_path / "a.txt")], tmp_path / "o", vocab_size=300))
    assert packed.meta.documents > 100 and packed.meta.unknown_share == 0 and len(packed.train) > 1000


def test_special_tokens_in_a_text_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{text} [MASK] [SEP] [PAD]" for text in make_texts(50)))
    options = {"vocab_size": 300, "seq_length": 32}
    packed = data.load(data.build([str(tmp_path / "a.txt")], tmp_path / "o", **options))
    in_processes = data.load(data.build([str(tmp_path / "a.txt")], tmp_path / "p", **options, num_proc=2))
    assert packed.meta.fingerprint == in_processes.meta.fingerprint
    stream = np.concatenate([stream_of(np.array(rows["input_ids"])) for rows in (packed.train, packed.validation)])
    assert np.count_nonzero(stream == SPECIAL["sep"]) == 50 - 2 and not np.isin(stream, [0, 2, 4]).any()


def test_an_existing_tokenizer_is_taken_as_it_is(built, packed, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(make_texts(80, seed=5)) + "\n\nпривет мир")
    out = data.build([str(tmp_path / "a.txt")], tmp_path / "o", tokenizer=str(built / "tokenizer"), seq_length=16)
    again = data.load(out)
    assert again.tokenizer.get_vocab() == packed.tokenizer.get_vocab()
    assert 0 < again.meta.unknown_share < 0.01


def test_python_docs_is_english_and_capped(tmp_path):
    texts = list(documents("python-docs:300KB", "text"))
    assert 300_000 <= sum(len(text.encode()) for text in texts) < 300_000 + 4 * BLOCK
    out = data.build(["python-docs:300KB"], tmp_path / "o", vocab_size=2000, seq_length=64)
    packed = data.load(out)
    assert " the " in packed.tokenizer.decode(packed.train[10]["input_ids"]) and packed.meta.unknown_share < 0.001


def test_a_replaced_folder_is_ours_or_left_alone(built, texts, tmp_path):
    source, out = str(write_jsonl(tmp_path / "a.jsonl", texts)), tmp_path / "out"
    options = {"vocab_size": 300, "seq_length": 32}
    data.build([source], out, **options)
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        data.build([source], out, **options)
    data.build([source], out, **options | {"seq_length": 16}, overwrite=True)
    assert data.load(out).meta.seq_length == 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="never overwritten"):
        data.build([source], tmp_path / "mine", **options, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "mine", "out"]


def test_a_failure_after_reading_leaves_nothing(texts, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows, "write", full)
    with pytest.raises(DataError, match=r"writing failed .No space left on device."):
        data.build([str(write_jsonl(tmp_path / "a.jsonl", texts))], tmp_path / "out", vocab_size=300, seq_length=32)
    assert os.listdir(tmp_path) == ["a.jsonl"]


KILLED = """
import os, signal, sys
from benchmarks import data as benchmark
from sctd_ds import data
from sctd_ds.data import parts, sources
sources.PIECE = parts.PIECE = 20_000
write, made = parts._write, []
def killed(path, *rest):
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(path)
    return write(path, *rest)
parts._write = killed
data.build([sys.argv[1]], sys.argv[2], vocab_size=300, seq_length=32, num_proc=1)
"""


def test_a_killed_build_goes_on_with_its_parts_and_ends_the_same(texts, tmp_path, small_pieces, monkeypatch):
    """It is killed with three parts finished, one of which is damaged after that: the other two are not made again."""
    source, out = str(write_jsonl(tmp_path / "a.jsonl", texts)), tmp_path / "out"
    write, made = parts._write, []
    monkeypatch.setattr(parts, "_write", lambda path, *rest: (made.append(path), write(path, *rest))[1])
    options = {"vocab_size": 300, "seq_length": 32, "num_proc": 1}
    whole = data.build([source], tmp_path / "whole", **options)
    assert subprocess.run([sys.executable, "-c", KILLED, source, str(out)], check=False).returncode == -9 and not out.exists()
    order, finished = [path.name for path in made], list((tmp_path / ".out.building" / "parts").glob("*.safetensors"))
    finished.sort(key=lambda path: order.index(path.name))
    made.clear()
    assert [path.name for path in finished] == order[:3] and len(order) > 4
    content = bytearray(finished[1].read_bytes())
    content[-9] ^= 1
    finished[1].write_bytes(content)
    (finished[1].parent / "half-written.safetensors.123").write_bytes(b"x")
    data.build([source], out, **options)
    assert [path.name for path in made] == [order[1], *order[3:]]
    assert data.load(out, verify=True).meta == data.load(whole).meta
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out", "whole"]


def test_an_interrupted_build_keeps_its_parts_and_an_error_only_many(texts, tmp_path, small_pieces, monkeypatch, caplog):
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    write, made = parts._write, []

    def stops(error):
        def stop(path, *rest):
            if len(made) == 2:
                raise error
            made.append(path)
            return write(path, *rest)

        made.clear()
        monkeypatch.setattr(parts, "_write", stop)
        with pytest.raises((type(error), DataError), match=r"disk is full|^$") as caught:
            data.build([source], tmp_path / "out", vocab_size=300, seq_length=32, num_proc=1)
        return str(caught.value), sorted(os.listdir(tmp_path))

    full = OSError(28, "disk is full")
    assert stops(full) == (f"{tmp_path / 'out'}: writing failed (disk is full); nothing was kept", ["a.jsonl"])
    assert stops(KeyboardInterrupt()) == ("", [".out.building", "a.jsonl"])
    monkeypatch.setattr(builder, "KEPT", 1)
    message, left = stops(full)
    assert "4 finished parts are kept" in message and "4 finished parts are kept" in caplog.text and left[0] == ".out.building"


def test_the_only_copy_left_by_a_kill_between_two_renames_comes_back(built, texts, tmp_path):
    """`build --overwrite` was killed when the old data set had gone and the new one was not there; the next build fails."""
    shutil.copytree(built, tmp_path / ".out.replaced")
    with pytest.raises(DataError, match=r"a\.jsonl|no text"):
        data.build([str(write_jsonl(tmp_path / "a.jsonl", []))], tmp_path / "out", overwrite=True)
    assert data.load(tmp_path / "out", verify=True)


def test_two_builds_of_one_folder_are_refused(texts, tmp_path, monkeypatch):
    source, out = str(write_jsonl(tmp_path / "a.jsonl", texts)), tmp_path / "out"
    options = {"vocab_size": 300, "seq_length": 32}
    pack, refused = builder._pack, []

    def second_build(*arguments):
        with pytest.raises(DataError, match="another process is building it"):
            data.build([source], out, **options)
        refused.append(1)
        return pack(*arguments)

    monkeypatch.setattr(builder, "_pack", second_build)
    data.build([source], out, **options)
    assert refused and sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


# --- parts, processes and machines -----------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    for module in (sources, parts):
        monkeypatch.setattr(module, "PIECE", 20_000)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_the_pieces_of_a_file_hold_its_documents(tmp_path, small_pieces, name):
    texts = [text.replace(" ", "\r\n", 3) for text in make_texts(300)]
    path = tmp_path / name
    if name == "a.txt":
        path.write_bytes("".join(text + ("\r\n \t\r\n" if i % 2 else "\n\n\n") for i, text in enumerate(texts)).encode())
    elif name == "a.jsonl":
        write_jsonl(path, texts)
    elif name == "a.parquet":
        pq.write_table(pa.table({"id": list(range(300)), "text": texts}), path, row_group_size=17)
    else:
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=17)
    found = sources.pieces(str(path), "text")
    assert len(found) > 3 and len({(piece.start, piece.stop) for piece in found}) == len(found)
    assert all(piece.size < 40_000 for piece in found)
    wanted = [text.replace("\r\n", "\n") if name == "a.txt" else text for text in texts]
    assert [text for piece in found for text in sources.read(piece, "text")] == wanted


def test_a_file_that_cannot_be_cut_is_one_piece(tmp_path, small_pieces):
    (tmp_path / "a.txt").write_text(" ".join(make_texts(400)))
    (piece,) = sources.pieces(str(tmp_path / "a.txt"), "text")
    assert (piece.start, piece.stop) == (0, piece.size)


def test_a_bad_line_of_a_late_piece_has_the_files_number(tmp_path, small_pieces):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(399))
    with path.open("a") as file:
        file.write("{\n")
    assert len(sources.pieces(str(path), "text")) > 2
    with pytest.raises(DataError, match=r"a\.jsonl, line 400, column 2: not valid JSON"):
        list(documents(str(path), "text"))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8") | st.sampled_from("ab \n\t\r\x0b\u00a0,.é你"), max_size=40), min_size=1, max_size=5
    )
)
def test_words_looked_up_have_the_ids_of_whole_documents(packed, documents):
    encoder, plain = Encoder(packed.tokenizer), Encoder(packed.tokenizer)
    assert encoder._by_word
    plain._by_word = False
    for batch in (documents, documents[::-1]):  # the second time, from memory
        found, wanted = encoder(batch), plain(batch)
        assert np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])


def test_an_encoder_forgets_and_cuts_long_documents(packed, monkeypatch):
    texts = [*make_texts(50, seed=8), " ".join(make_texts(200, seed=9)), "x" * 3 * BLOCK]
    pieces = [packed.tokenizer([*cut(text)], add_special_tokens=False)["input_ids"] for text in texts]
    wanted = [list(itertools.chain.from_iterable(ids)) for ids in pieces]
    monkeypatch.setattr("sctd_ds.data.tokenizer.KNOWN_WORDS", 20)
    encoder = Encoder(packed.tokenizer)
    for start in range(0, len(texts), 10):
        ids, lengths = encoder(texts[start : start + 10])
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted[start : start + 10]
        assert len(encoder._numbers) <= 20


def test_a_tokenizer_with_words_of_its_own_reads_whole_documents(packed):
    import copy

    extended = copy.deepcopy(packed.tokenizer)
    extended.add_tokens(["new york"])
    assert not Encoder(extended)._by_word
    ids, _ = Encoder(extended)(["to new york"])
    assert ids[-1] == len(extended) - 1


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 60)), min_size=2, max_size=40),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    files=st.integers(1, 3),
)
def test_documents_are_held_out_in_the_order_of_their_keys(tmp_path_factory, documents, fraction, files):
    """Against the rule in a few lines: sorted by key, long ones last, until the share and a row are full."""
    of_key = dict(documents)  # equal keys are equal texts
    keys = np.array([key for key, _ in documents]) << 56
    lengths = np.array([of_key[key] for key, _ in documents])
    wanted = max(fraction * lengths.sum(), 6)
    order = np.lexsort((keys, lengths > wanted))
    filled = np.searchsorted(np.cumsum(lengths[order]), wanted)
    expected = np.isin(keys, keys[order[: filled + 1]])
    folder = tmp_path_factory.mktemp("split")
    chunks = np.array_split(np.arange(len(keys)), files)
    paths = [write_part(folder / f"{i}.part", [[7] * n for n in lengths[c]], keys[c]) for i, c in enumerate(chunks)]
    nothing = [np.empty(0, dtype=bool)] * files
    if filled == len(order) or lengths[~expected].sum() < 6:
        with pytest.raises(DataError, match="too little text"):
            split.hold_out(paths, nothing, fraction, 8)
    else:
        assert np.array_equal(split.hold_out(paths, nothing, fraction, 8)(keys, lengths), expected)


OPTIONS = {"vocab_size": 300, "seq_length": 32, "tokenizer_sample": 30_000}


@pytest.fixture
def one_build(texts, tmp_path, small_pieces):
    """The text, and a data set built of it by one process."""
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    return source, data.build([source], tmp_path / "one", **OPTIONS, num_proc=1)


def test_processes_change_nothing(one_build, tmp_path):
    source, one = one_build
    two = data.build([source], tmp_path / "two", **OPTIONS, num_proc=2)
    assert data.load(two, verify=True).meta == data.load(one).meta


@pytest.mark.parametrize("count", [1, 3, 9])
def test_shares_of_several_machines_merge_to_one_build(one_build, tmp_path, count):
    """Each machine has the text at another place; nine of them are more than there are parts."""
    source, one = one_build
    shares = []
    for number in range(1, count + 1):
        here = tmp_path / f"machine{number}"
        here.mkdir()
        shutil.copy(source, here)
        shares.append(data.build([str(here / "a.jsonl")], here / "share", **OPTIONS, shard=(number, count), num_proc=1))
    merged = data.load(data.merge(shares[::-1], tmp_path / "merged", num_proc=1), verify=True).meta
    wanted = data.load(one).meta
    assert (merged.files, merged.fingerprint, merged.settings) == (wanted.files, wanted.fingerprint, wanted.settings)
    assert (merged.documents, merged.text_bytes) == (wanted.documents, wanted.text_bytes)


def test_a_share_killed_at_its_very_end_keeps_its_parts(one_build, tmp_path, monkeypatch):
    source, _ = one_build

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder, "_put_in_place", stop)
        with pytest.raises(KeyboardInterrupt):
            data.build([source], tmp_path / "share", **OPTIONS, shard=(1, 1), num_proc=1)
    monkeypatch.setattr(parts, "_write", None)  # nothing is tokenized again
    share = data.build([source], tmp_path / "share", **OPTIONS, shard=(1, 1), num_proc=1)
    assert len(list((share / "parts").iterdir())) > 3 and not (tmp_path / ".share.building").exists()


def test_a_corrected_file_costs_its_own_parts_only(built, texts, tmp_path, small_pieces, monkeypatch):
    """The wrong one is the last of three, and the correction moves nothing of the others."""
    folder, out = tmp_path / "text", tmp_path / "out"
    folder.mkdir()
    for name in "ac":
        write_jsonl(folder / f"{name}.jsonl", [*texts[:200], name])
    with (folder / "c.jsonl").open("a") as file:
        file.write("{\n")
    monkeypatch.setattr(builder, "KEPT", 1)
    options = {"tokenizer": str(built / "tokenizer"), "seq_length": 32, "num_proc": 1}
    with pytest.raises(DataError, match=r"c\.jsonl, line 202"):
        data.build([str(folder)], out, **options)
    before = {path.name for path in (tmp_path / ".out.building" / "parts").iterdir()}
    write_jsonl(folder / "c.jsonl", texts[:300])
    write_jsonl(folder / "b.jsonl", texts[:50])
    write, made = parts._write, []
    monkeypatch.setattr(parts, "_write", lambda path, *rest: (made.append(path.name), write(path, *rest))[1])
    data.build([str(folder)], out, **options)
    of_a = [parts.Job(out, out, "", "text", 0).file(part) for part in parts.plan([str(folder / "a.jsonl")], "text")]
    assert len(before) > len(of_a) and made and not before & set(made)


def test_shares_that_do_not_fit_together_are_refused(one_build, tmp_path):
    source, one = one_build
    first, second, other = (
        data.build([source], tmp_path / f"share{i}", **OPTIONS | changed, shard=(number, 2), num_proc=1)
        for i, (number, changed) in enumerate([(1, {}), (2, {}), (2, {"seed": 1})])
    )
    for shares, message in [
        ([first], r"of 2 shares, 2 lack"),
        ([first, second, second], "a share is given twice"),
        ([first, other], r"share2: of another build than .*share0"),
        ([first, one], r"one: not a share of a build"),
        ([], "no shares to merge"),
    ]:
        with pytest.raises(DataError, match=message):
            data.merge(shares, tmp_path / "merged")
    for refuse in (data.load, lambda share: data.check(str(share), seq_length=32)):
        with pytest.raises(DataError, match=r"share0: one share of a build; put all of them together"):
            refuse(first)
    victim = next((second / "parts").iterdir())
    content = bytearray(victim.read_bytes())
    content[-9] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DataError, match=f"{victim.name}: missing or damaged"):
        data.merge([first, second], tmp_path / "merged", num_proc=1)
    (first / "shard.json").write_text("[1]")
    with pytest.raises(DataError, match=r"shard\.json: damaged"):
        data.merge([first, second], tmp_path / "merged")
    assert not [name for name in os.listdir(tmp_path) if "merged" in name]


def test_a_tokenizer_learns_from_a_seeded_sample(texts, tmp_path, small_pieces):
    planned = parts.plan([str(write_jsonl(tmp_path / "a.jsonl", make_texts(3000)))], "text")
    total = sum(part.size for part in planned)
    assert [part for part, _ in parts.sample(planned, 2 * total, seed=0)] == planned
    chosen = [[part.number for part, _ in parts.sample(planned, total // 3, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] == sorted(chosen[0])
    assert 0.2 < len(chosen[0]) / len(planned) < 0.5
    words = parts.count_words(planned[0], "text", lowercase=True, most=1000)
    assert 100 < sum(words.values()) < 500  # about 1000 bytes of words of four letters, and the rest of a document


def test_words_are_counted_as_bert_splits_them(monkeypatch):
    counter = WordCounter(lowercase=True)
    counter.add(["The café, the CAFE\nthe\tend.", "don't 42 你好"])
    pieces = counter.pre_tokenizer.pre_tokenize_str(
        counter.normalizer.normalize_str("The café, the CAFE the end. don't 42 你好")
    )
    assert counter.words == collections.Counter(piece for piece, _ in pieces)
    monkeypatch.setattr("sctd_ds.data.tokenizer.COUNTED_WORDS", 8)
    counter.merge({"rare": 1, "frequent": 9})
    assert len(counter.words) == 4 and {"the", "cafe", "frequent"} <= counter.words.keys()


def test_duplicates_are_dropped_and_counted(tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(split, "SORTED", 50)
    texts = make_texts(300, seed=1)
    once, often = (write_jsonl(tmp_path / f"{n}.jsonl", texts[:200] * n + texts[200:]) for n in (1, 3))
    options = {"vocab_size": 300, "seq_length": 32, "validation_fraction": 0.3, "num_proc": 1}
    wanted = data.load(data.build([str(once)], tmp_path / "once", **options)).meta
    tok = str(tmp_path / "once" / "tokenizer")
    found = data.load(data.build([str(often)], tmp_path / "often", **options, tokenizer=tok, dedup=True), verify=True).meta
    assert found.fingerprint == wanted.fingerprint and wanted.duplicates == 0
    assert (found.duplicates, found.documents) == (400, 700)


def test_too_little_room_is_said_at_once(texts, tmp_path, small_pieces, monkeypatch, caplog):
    caplog.set_level("INFO", "sctd_ds.data")
    monkeypatch.setattr(builder, "FORECAST", 0)
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    out = data.build([source], tmp_path / "out", vocab_size=300, seq_length=32, num_proc=1)
    (line,) = [record.message for record in caplog.records if "of disk while it builds" in record.message]
    needed, final = (float(number) * 1000 for number in re.findall(r"([\d.]+)kB (?:of disk|in the end)", line))
    there = sum(file.stat().st_size for split_ in ("train", "validation") for file in (out / split_).iterdir())
    assert 0.9 * final < there < 1.2 * final and 1.9 * final < needed < 3 * final
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(DataError, match=r"the build needs about .*B, and 1kB are free; make room"):
        data.build([source], tmp_path / "full", vocab_size=300, seq_length=32, num_proc=1)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, caplog):
    caplog.set_level("INFO", "sctd_ds.data")
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(now))
    with workers.progress("tokenizing", 4_000_000_000) as shown:
        for _ in range(4):
            shown.add(10**9)
    lines = [record.message for record in caplog.records]
    assert lines == ["tokenizing: 50%, 2GB (50MB/s), 40 s left", "tokenizing: 4GB (50MB/s)"]


def test_data_of_format_1_are_still_read(packed, built, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(built / "tokenizer", old / "tokenizer")
    for name in rows.SPLITS:
        ids = [row["input_ids"] for row in getattr(packed, name)]
        Dataset.from_dict({"input_ids": ids}).save_to_disk(old / name)
    fields = json.loads((built / "meta.json").read_text()) | {"format": 1, "files": builder._all_facts(old)}
    del fields["duplicates"], fields["text_bytes"]
    (old / "meta.json").write_text(json.dumps(fields))
    found = data.load(old, seq_length=32, verify=True)
    assert found.train[3]["input_ids"] == packed.train[3]["input_ids"]
    batches = [next(make_loader(packed.tokenizer, each.train)) for each in (found, packed)]
    assert same(*batches)


def test_ids_take_two_bytes_where_the_vocabulary_allows(packed, tokenizer):
    assert packed.train.features["input_ids"].feature.dtype == "uint16"
    wide = BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(65536))])}
    )
    assert (id_type(tokenizer), id_type(wide)) == (np.uint16, np.int32)


# --- other sources ---------------------------------------------------------------------------------------------------


def test_urls_are_read_like_files(texts, tmp_path, small_pieces):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/b/a.jsonl", write_jsonl(tmp_path / "a.jsonl", texts).read_bytes())
    memory.pipe("/bucket/b/c.txt.gz", gzip.compress("\n\n".join(texts).encode()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=50)
    memory.pipe("/bucket/b/d.parquet", (tmp_path / "d.parquet").read_bytes())
    memory.pipe("/bucket/b/notes.md", b"no")
    for source, times in [
        ("memory://bucket/b/a.jsonl", 1),
        ("memory://bucket/b/c.txt.gz", 1),
        ("memory://bucket/b", 3),
        ("memory://bucket/b/*.parquet", 1),
        (f"file://{tmp_path}/a.jsonl", 1),
    ]:
        assert list(documents(source, "text")) == texts * times, source
    before = sources.identity("memory://bucket/b")
    assert len(before) == 3 and sources.identity("memory://bucket/b") == before
    memory.pipe("/bucket/b/c.txt.gz", gzip.compress(b"other"))
    assert sources.identity("memory://bucket/b") != before
    options = {"vocab_size": 300, "seq_length": 32, "num_proc": 1}
    remote = data.build(["memory://bucket/b/a.jsonl"], tmp_path / "remote", **options)
    local = data.build([str(tmp_path / "a.jsonl")], tmp_path / "local", **options)
    assert data.load(remote).meta.files == data.load(local).meta.files


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/gone.txt", "no such file or folder there"),
        ("memory://bucket/gone", "no such folder, or an unknown file type"),
        ("memory://bucket/a.xls", "no such folder, or an unknown file type"),
        ("nosuch://bucket/a.txt", "nosuch://bucket/a.txt: .*nosuch"),
        ("s3://bucket/a.txt", "(?i)s3://bucket/a.txt: .*s3fs"),
    ],
)
def test_a_bad_url_gets_one_line(tmp_path, url, message):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(DataError, match=message) as caught:
        data.build([url], tmp_path / "out")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["-", "-.jsonl", "-.jsonl.gz"])
def test_standard_input_is_a_source(texts, tmp_path, monkeypatch, kind):
    content = "\n\n".join(texts).encode() if kind == "-" else write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    content = gzip.compress(content) if kind.endswith(".gz") else content
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    packed = data.load(data.build([kind], tmp_path / "out", vocab_size=300, seq_length=32))
    assert packed.meta.documents == len(texts) and packed.meta.sources == [kind]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_standard_input_has_limits(tmp_path):
    for names, options, message in [
        (["-", "-.jsonl"], {}, "can be read once"),
        (["-"], {"shard": (1, 2)}, "without --shard"),
        (["-.doc"], {}, "unknown file type; expected - followed by one of"),
    ]:
        with pytest.raises(DataError, match=message):
            data.build(names, tmp_path / "out", **options)


def write_ids(path, ids: list[list[int]]) -> str:
    pq.write_table(pa.table({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}), path)
    return str(path)


def test_tokenized_data_are_cleaned_and_packed_by_us(built, packed, texts, tmp_path):
    ids = packed.tokenizer(texts, add_special_tokens=False)["input_ids"]
    options = {"tokenizer": str(built / "tokenizer"), "seq_length": 32, "num_proc": 1}
    cls, sep, pad = (SPECIAL[name] for name in ("cls", "sep", "pad"))
    framed = [[cls, *row, sep, *[pad] * (i % 3)] for i, row in enumerate(ids)]
    joined = [[token for row in framed[i : i + 5] for token in row] for i in range(0, len(framed), 5)]
    Dataset.from_dict({"input_ids": framed}).save_to_disk(tmp_path / "saved")
    found = []
    bare, stuck = write_ids(tmp_path / "bare.parquet", ids), write_ids(tmp_path / "joined.parquet", joined)
    for source in (bare, stuck, str(tmp_path / "saved")):
        meta = data.load(data.build([source], tmp_path / "out", **options, overwrite=True), verify=True).meta
        found.append((meta.fingerprint, meta.documents, meta.train_tokens + meta.validation_tokens))
    assert len(set(found)) == 1 and found[0][1:] == (len(texts), sum(map(len, ids)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[5, 6, 300]], r"holds the id 300, and the tokenizer's go from 0 to \d+"),
        ([[5, -1]], r"holds the id -1"),
        ([[5, 4, 6]], r"holds masked tokens \(id 4\)"),
        ("other order", r"its ids are not of this tokenizer: of \d+ texts, \d+ are the same"),
        ([[0.5, 1.0]], r"column 'input_ids' holds list<.*double>, expected a list of whole numbers"),
        ([[2, 3, 0]], "there is no text in it"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(built, packed, texts, tmp_path, ids, message):
    tokenizer = built / "tokenizer"
    if ids == "other order":  # of the same vocabulary
        count = len(packed.tokenizer)
        right = packed.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [[5 + (7 * token) % (count - 5) for token in row] for row in right]
    source = write_ids(tmp_path / "a.parquet", ids)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=message):
        data.build([source], tmp_path / "out", tokenizer=str(tokenizer), seq_length=32, num_proc=1)
    with pytest.raises(DataError, match="holds token ids; name the tokenizer that made them"):
        data.build([source], tmp_path / "out", seq_length=32)
    assert sorted(os.listdir(tmp_path)) == before


def test_every_option_of_a_build_is_a_key_of_a_run(tmp_path, monkeypatch):
    from sctd_ds.run import job

    given = {}

    def prepare(spec, folder, **options):
        given.update(options)
        raise DataError("enough")

    monkeypatch.setattr(data, "prepare", prepare)
    keys = ["cased=true", "text_column=body", "validation_fraction=0.2", "dedup=true", "vocab_size=500", "seq_length=64"]
    monkeypatch.setattr(job.ranks, "on_first", lambda function: function())
    run = job.load("tiny", [f"pretrain.{key}" for key in keys])
    with pytest.raises(DataError, match="enough"):
        job.prepare_data("my.txt", run)
    wanted = {"lowercase": False, "text_column": "body", "validation_fraction": 0.2, "dedup": True, "vocab_size": 500}
    assert given == {**wanted, "seq_length": 64, "tokenizer": None}
    elsewhere = {"seed", "tokenizer_sample", "num_proc", "shard", "overwrite"}  # of the order, of speed, of the command line
    assert given.keys() | elsewhere == data.build.__kwdefaults__.keys()


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": (b"", r"empty\.txt: there is no text in it"),
    "blank.txt": (b"\n \r\n\n", r"blank\.txt: there is no text in it"),
    "latin.txt": (b"0123456789caf\xe9 au lait", r"not UTF-8 at byte 13 \(0xe9\)"),
    "late.txt": (b"\xef\xbb\xbf" + b"a " * 700_000 + b"\xff", r"not UTF-8 at byte 1400003 \(0xff\)"),
    "cut.txt": (b"abc\xe2\x82", r"not UTF-8 at byte 3 \(0xe2\)"),
    "utf16.txt": ("hello".encode("utf-16"), r"not UTF-8 at byte 0|byte 3 is NUL"),
    "binary.txt": (b"MZ\0\1\2", r"byte 2 is NUL.*binary file or UTF-16"),
    "broken.txt.gz": (gzip.compress(b"hello world " * 50)[:-12], r"broken\.txt\.gz: cannot be read"),
    "nogz.txt.gz": (b"hello", r"nogz\.txt\.gz: cannot be read"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2, column \d+: not valid JSON"),
    "columns.jsonl": (b'{"body": "a", "id": 1}\n', r"line 1: no column 'text'; there are 'body', 'id'"),
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 3}\n', r"line 3: column 'text' holds int, expected a string"),
    "list.jsonl": (b"[1]\n", r"line 1: expected an object with a column 'text', got list"),
    "half.jsonl": (b'{"text": "a\\ud800"}\n', r"line 1: column 'text' holds half a surrogate pair"),
    "nulls.jsonl": (b'{"text": null}\n', r"there is no text in it"),
    "digits.jsonl": (
        b'{"text": "a"}\n{"text": "a", "n": ' + b"1" * 5000 + b"}",
        r"line 2: a number with more than 4300 digits",
    ),
    "bad.json": (b'[{"text": "a"},\n {"text" 3}]', r"bad\.json, line 2, column 10: not valid JSON"),
    "bad.parquet": (b"PAR1 not really", r"bad\.parquet: not a readable Parquet or Arrow file"),
    "table.xls": (b"text\na\n", r"unknown file type; expected one of \.txt, "),
    "columns.csv": (b"id,body\n1,a\n", r"columns\.csv: no column 'text'; there are 'id', 'body'"),
    "short.csv": (b"id,text\n1,a\n\n2\n", r"short\.csv, line 4: 1 fields, but 'text' is field 2"),
    "broken.txt.xz": (lzma.compress(b"hello world " * 50)[:-12], r"broken\.txt\.xz: cannot be read"),
    "nozstd.txt.zst": (b"hello", r"nozstd\.txt\.zst: cannot be read"),
    "bad.arrow": (b"ARROW1 not really", r"bad\.arrow: not a readable Parquet or Arrow file"),
    "short.txt": (b"a few words only\n\nand a few more", r"too little text: 8 tokens in 2 documents"),
    "one.jsonl": (json.dumps({"text": "word " * 5000}).encode(), r"too little text: 5000 tokens in 1 documents"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_gets_one_line_and_leaves_nothing(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.build([str(tmp_path / name)], tmp_path / "out", vocab_size=100, seq_length=32)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_bad_places_get_one_line(built, tmp_path, monkeypatch):
    def build(source, **options):
        return data.build([str(source)], tmp_path / "out", **options)

    with pytest.raises(DataError, match=r"gone\.txt: no such file or folder"):
        build(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        build("gone")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"folder: no text in this folder; expected files ending in \.txt"):
        build(tmp_path / "folder")
    with pytest.raises(DataError, match="already a built data set"):
        build(built)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; there are 'body'"):
        build(tmp_path / "a.parquet")
    (tmp_path / "locked.txt").write_text("x")
    real_open = builtins.open
    locked = str(tmp_path / "locked.txt")  # root may read anything, so the refusal is simulated

    def refuse(file, *args, **kwargs):
        if str(file) == locked:
            raise PermissionError(13, "Permission denied")
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(DataError, match=r"locked\.txt: cannot be read \(Permission denied\)"):
        build(locked)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        data.build(["python-docs:1KB"], tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [False, True], ids=["given", "in a folder"])
def test_what_is_no_regular_file_is_refused_instead_of_read(tmp_path, inside):
    """Reading a pipe that nobody writes to never ends."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, make, message in [
        ("pipe.txt", os.mkfifo, r"pipe\.txt: not a regular file"),
        ("self.txt", lambda path: path.symlink_to(path), r"self\.txt: cannot be read \(Too many levels of symbolic links\)"),
    ]:
        make(folder / name)
        for use in (lambda source: data.build([source], tmp_path / "out"), lambda source: data.prepare(source, tmp_path / "c")):
            with pytest.raises(DataError, match=message):
                use(str(folder if inside else folder / name))
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "a source is empty"),
        ("a\0b.txt", "cannot be read .*null"),
        ("x" * 5000, "File name too long"),
        ("owner/" + "x" * 5000, "File name too long"),
        ("~nobody-of-this-name/a.txt", "no such file or folder"),
    ],
    ids=["empty", "NUL", "long", "long Hub name", "unknown user"],
)
def test_a_name_that_cannot_be_a_path_gets_one_line(tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        data.prepare(source, tmp_path / "cache")
    with pytest.raises(DataError, match=message):
        data.build([source], tmp_path / "out")
    for out in ("a\0b", "x" * 5000):
        with pytest.raises(DataError, match="cannot be written"):
            data.build(["python-docs:1KB"], tmp_path / out)


@settings(max_examples=200, deadline=None)
@given(st.text("a \n", max_size=4 * 16))
def test_cut_gives_the_pieces_that_cutting_off_one_after_the_other_gives(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sctd_ds.data.readers.BLOCK", 16)
        found, rest = list(cut(text)), text
        for piece in found:
            end = max(rest.rfind("\n", 1, 16), 0) or max(rest.rfind(" ", 1, 16), 0) or 16
            assert piece == (rest[:end] if len(rest) > 16 else rest)
            rest = rest[len(piece) :]
        assert not rest


class Counted(str):
    """A text that counts the characters copied out of it."""

    copied = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        Counted.copied += len(part)
        return Counted(part)


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_cut_copies_a_text_once(separator):
    text = Counted((separator + "abcdefg") * 20 * BLOCK)
    Counted.copied = 0
    assert "".join(cut(text)) == text and Counted.copied == len(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": 4}, "seq_length must be at least 8, got 4"),
        ({"vocab_size": 5}, "vocab_size must be above"),
        ({"vocab_size": 10}, r"is too small for the characters of this text; give at least \d+"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
        ({"seed": -1}, "0 <= seed"),
        ({"tokenizer": "TOKENIZER"}, "the tokenizer has no cls, sep, mask token"),
        ({"tokenizer": "EMPTY"}, "cannot be loaded as a tokenizer"),
    ],
)
def test_bad_settings_get_one_line(tmp_path, options, message):
    from transformers import PreTrainedTokenizerFast

    bare = BertTokenizer(vocab={"[UNK]": 0, "a": 1, "[PAD]": 2}).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path / "tok")
    (tmp_path / "empty").mkdir()
    places = {"TOKENIZER": str(tmp_path / "tok"), "EMPTY": str(tmp_path / "empty")}
    options = {name: places.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    with pytest.raises(DataError, match=message) as caught:
        data.build([str(source)], tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "empty", "tok"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("remove train/data-00000-of-00001.arrow", "is missing, so the data set is incomplete"),
        ("edit tokenizer/tokenizer_config.json", "tokenizer_config.json has changed since it was built"),
        ("shorten train/data-00000-of-00001.arrow", "has changed since it was built"),
        ("flip train/data-00000-of-00001.arrow", "has changed since it was built"),
        ("remove meta.json", "not a built data set"),
        ("shorten meta.json", "meta.json: damaged"),
        ("edit meta.json", "meta.json: damaged|format"),
        ("nest meta.json", "meta.json: damaged"),
        ("empty meta.json", "meta.json: damaged"),
    ],
)
def test_damaged_folder_is_refused(built, tmp_path, damage, message):
    copy = shutil.copytree(built, tmp_path / "copy")
    kind, name = damage.split(" ")
    content = bytearray((copy / name).read_bytes())
    if kind == "remove":
        (copy / name).unlink()
    elif kind == "shorten":
        (copy / name).write_bytes(content[: len(content) // 2])
    elif kind == "flip":
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    elif kind == "nest":
        (copy / name).write_bytes(b"[" * 100_000)
    elif kind == "empty":
        (copy / name).write_text(json.dumps({**json.loads(content), "files": {"a": []}}))
    else:
        (copy / name).write_bytes(content.replace(b"{", b'{"added": 1, ', 1))
    with pytest.raises(DataError, match=message):
        data.load(copy, verify=kind == "flip")


def test_hub_name_is_a_name_only_where_no_path_can_be_meant(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "some/gone":
            raise ConnectionError("no route\nto host")
        return iter([{"text": "from the hub"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(documents("some/name:en", "text")) == ["from the hub"]
    with pytest.raises(DataError, match=r"some/gone: no such path here.*\(no route\); check the name"):
        list(documents("some/gone", "text"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for path in ("texts/gone", "other/gone.txt", "a/b/c", "gone"):
        with pytest.raises(DataError, match="no such file or folder"):
            list(documents(path, "text"))
    assert [name for name, *_ in asked] == ["some/name", "some/gone"] and asked[0][1:] == ("en", "train", True)


def test_another_sequence_length_is_refused(built):
    with pytest.raises(DataError, match="built for seq_length 32, but seq_length 128 was requested"):
        data.load(built, seq_length=128)


def test_command_line_answers_bad_input_with_one_line(tmp_path, capsys):
    assert main(["build", str(tmp_path / "gone.txt"), "--out", str(tmp_path / "o")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_command_line_shows_a_data_set(built, packed, capsys):
    assert main(["show", str(built), "--rows", "2", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert packed.meta.fingerprint[:16] in shown and f"{packed.meta.train_tokens:,} tokens" in shown
    assert shown.count("[CLS]") == 2


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_prepare_builds_once_per_content_and_options(built, texts, tmp_path):
    source, cache = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "cache"
    options = {"vocab_size": 300, "seq_length": 32}
    assert data.prepare(str(built), cache, **options) == built and not cache.exists()
    first = data.prepare(str(source), cache, **options)
    stamp = (first / "meta.json").stat().st_mtime_ns
    assert data.prepare([str(source)], cache, **options) == first and (first / "meta.json").stat().st_mtime_ns == stamp
    assert data.prepare(str(source), cache, **options | {"seq_length": 16}) != first
    write_jsonl(source, texts[:-1])
    assert data.prepare(str(source), cache, **options) != first
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3


def test_prepare_knows_a_tokenizer_by_its_content(built, texts, tmp_path):
    source, cache = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "cache"
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        data.load(built).tokenizer.save_pretrained(folder)
    first = data.prepare(str(source), cache, seq_length=32, tokenizer=str(here))
    (there / "README.md").write_text("a model's card")
    (there / "config.json").write_text("{}")
    assert data.prepare(str(source), cache, seq_length=32, tokenizer=str(there)) == first
    file = there / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_lower_case": False}))
    assert data.prepare(str(source), cache, seq_length=32, tokenizer=str(there)) != first


def test_prepare_by_several_processes_builds_once(texts, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    code = (
        "import sys, sctd_ds.data.builder as p; real = p.build\n"
        "p.build = lambda *a, **k: (print('built'), real(*a, **k))[1]\n"
        "print(p.prepare(sys.argv[1], sys.argv[2], vocab_size=300, seq_length=32))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = sorted(line for process in running for line in process.communicate()[0].splitlines())
    assert [process.returncode for process in running] == [0, 0]
    assert lines[0] == lines[1] and lines[2:] == ["built"]


# --- masking ---------------------------------------------------------------------------------------------------------


def test_masking_follows_the_rule_of_transformers_collator(tokenizer):
    rows = np.array(make_rows(4000, seq_length=64)["input_ids"])
    masker = Masker(tokenizer, seed=3)
    found = masker(rows, [(0, i) for i in range(len(rows))])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=3)
    expected = collator([{"input_ids": row.tolist()} for row in rows])

    def shares(ids, labels):
        chosen = labels != -100
        kept, masked = ids[chosen] == labels[chosen], ids[chosen] == SPECIAL["mask"]
        return np.array([chosen.mean(), masked.mean(), kept.mean(), (~masked & ~kept).mean()])

    found = shares(*found)
    expected = shares(expected["input_ids"].numpy(), expected["labels"].numpy())
    assert found[0] == 9 / 64  # round(0.15 * 62) of 64, exactly
    assert np.abs(found[1:] - [0.8, 0.1, 0.1]).max() < 0.008  # 36,000 labels: four standard errors
    assert np.abs(found[1:] - expected[1:]).max() < 0.012
    assert abs(found[0] - expected[0]) < 0.012


def test_every_position_and_every_word_has_its_turn(tokenizer):
    row = np.array(make_rows(1, seq_length=16)["input_ids"][0])
    masker = Masker(tokenizer, seed=0, mlm_probability=0.3)
    ids, labels = masker(np.tile(row, (20_000, 1)), [(epoch, 0) for epoch in range(20_000)])
    labels = labels != -100
    assert (labels.sum(1) == 4).all() and not labels[:, [0, -1]].any()
    assert np.abs(labels[:, 1:-1].mean(0) - 4 / 14).max() < 0.014
    random_words = ids[labels & (ids != SPECIAL["mask"]) & (ids != row)]
    counts = np.bincount(random_words, minlength=1000)
    assert (counts[:5] == 0).all() and counts.sum() > 7000 and counts[5:].max() < 30  # about 8 each


def test_mask_is_a_function_of_seed_epoch_and_sample_only(tokenizer):
    rows = np.array(make_rows(4, seq_length=64, padded=40)["input_ids"])
    samples = [(2, 5), (0, 0), (2, 6), (3, 5)]
    masker = Masker(tokenizer, seed=7)
    ids, labels = masker(rows, samples)
    for i, sample in enumerate(samples):  # neither its companions in a batch nor what came before matter
        alone = Masker(tokenizer, seed=7)(rows[i : i + 1], [sample])
        assert np.array_equal(alone[0][0], ids[i]) and np.array_equal(alone[1][0], labels[i])
    assert np.array_equal(np.where(labels == -100, ids, labels), rows)  # labels restore the rows
    same_row = np.tile(rows[0], (4, 1))
    patterns = [*masker(same_row, samples)[1], Masker(tokenizer, seed=8)(rows[:1], samples[:1])[1][0]]
    assert len({pattern.tobytes() for pattern in patterns}) == 5


def test_label_count_depends_on_the_length_only(tokenizer):
    masker = Masker(tokenizer, seed=0)
    row = np.array(make_rows(1, seq_length=64)["input_ids"][0])
    with_separators, short, unknown = row.copy(), np.zeros(64, dtype=int), np.ones(64, dtype=int)
    with_separators[5:40:3] = SPECIAL["sep"]
    short[:3] = [2, 77, 3]
    batch = np.stack([row, with_separators, short, unknown])
    ids, labels = masker(batch, [(0, i) for i in range(4)])
    assert (labels != -100).sum(1).tolist() == [9, 9, 1, 0] and masker.labels_per_row(64) == 9
    assert labels[2].tolist() == [-100, 77] + [-100] * 62
    special = np.isin(batch, list(SPECIAL.values()))
    assert (ids[special] == batch[special]).all() and (labels[special] == -100).all()


@pytest.mark.parametrize("wrong", [-1, -999, 1000, 2**31 - 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_that_is_not_of_the_tokenizer_is_named(tokenizer, wrong, workers):
    rows = np.array(make_rows(12)["input_ids"])
    rows[7, 3] = wrong
    rows = Dataset.from_dict({"input_ids": rows.tolist()})
    masker = Masker(tokenizer, 0)
    loader = Loader(rows, masker, micro_batch=12, accumulation=1, rank=0, world=1, seed=0, num_workers=workers)
    message = f"row 7 of the data holds the id {wrong}, and the tokenizer's go from 0 to 999: the data are damaged"
    with pytest.raises(DataError, match=message):
        next(loader)
    with pytest.raises(DataError, match=message):
        list(validation_batches(rows, masker, batch_size=12))


def test_masker_refuses_nonsense(tokenizer):
    for options in ({"mlm_probability": 0.0}, {"mlm_probability": 1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Masker(tokenizer, **{"seed": 0} | options)


# --- loading ---------------------------------------------------------------------------------------------------------


def make_loader(tokenizer, rows, **options):
    defaults = {"micro_batch": 2, "accumulation": 2, "rank": 0, "world": 1, "seed": 5}
    return Loader(rows, Masker(tokenizer, seed=5), **defaults | options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_row_comes_once_per_epoch_in_a_new_order(tokenizer):
    loader = make_loader(tokenizer, make_rows(10), micro_batch=3, accumulation=1)
    samples = []
    for _ in range(10):  # 30 samples, 3 epochs; batches span their ends
        next(loader)
        samples += loader.sample_ids
    assert [epoch for epoch, _ in samples] == [0] * 10 + [1] * 10 + [2] * 10
    orders = [[row for e, row in samples if e == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(10)) and orders[0] != list(range(10))
    assert loader.position == 30


def test_batches_hold_the_rows_they_name(tokenizer):
    rows = make_rows(7)
    loader, masker = make_loader(tokenizer, rows), Masker(tokenizer, seed=5)
    for _ in range(9):
        batch = next(loader)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        for i, (epoch, row) in enumerate(loader.sample_ids):
            ids, labels = masker(np.array([rows[row]["input_ids"]]), [(epoch, row)])
            assert batch["input_ids"][i].tolist() == ids[0].tolist()
            assert batch["labels"][i].tolist() == labels[0].tolist()


@pytest.mark.parametrize(("micro_batch", "accumulation", "world"), [(1, 12, 1), (3, 2, 2), (3, 1, 4), (2, 3, 2), (1, 1, 12)])
def test_a_step_sees_the_same_samples_for_every_split(tokenizer, micro_batch, accumulation, world):
    rows = make_rows(31)
    whole = make_loader(tokenizer, rows, micro_batch=12, accumulation=1)
    split = [
        make_loader(tokenizer, rows, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world=world)
        for rank in range(world)
    ]
    for _ in range(6):
        batch = next(whole)
        parts = [next(loader) for _ in range(accumulation) for loader in split]
        for name in ("input_ids", "labels"):
            assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
        assert {loader.position for loader in split} == {whole.position}


@pytest.mark.parametrize("stop", range(1, 12))
def test_resumed_run_sees_what_the_uninterrupted_run_saw(tokenizer, stop):
    rows = make_rows(13, padded=4)  # 13 rows, 4 samples a step: epochs end inside steps and inside micro-batches
    whole, first = make_loader(tokenizer, rows), make_loader(tokenizer, rows)
    for _ in range(2 * stop):
        assert same(next(whole), next(first))
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"position": 4 * stop}
    resumed = make_loader(tokenizer, rows)
    next(resumed)  # what was taken before must not matter
    resumed.load_state_dict(state)
    started = make_loader(tokenizer, rows, start=4 * stop)
    for _ in range(8):
        expected = next(whole)
        assert same(expected, next(resumed)) and same(expected, next(started))
        assert whole.sample_ids == resumed.sample_ids and whole.position == resumed.position


def test_position_counts_finished_steps(tokenizer):
    loader = make_loader(tokenizer, make_rows(9), accumulation=3, world=2)
    positions = [loader.position]
    for _ in range(6):
        next(loader)
        positions.append(loader.position)
    assert positions == [0, 0, 0, 12, 12, 12, 24]


def test_the_rows_of_samples_are_those_of_the_steps_that_they_belong_to(tokenizer):
    """Two ranks, two micro-batches a step, five rows: a step has eight samples, over two epochs and more."""
    options = {"micro_batch": 2, "accumulation": 2, "world": 2, "seed": 3}
    loaders = [Loader(make_rows(5), Masker(tokenizer, 0), rank=rank, **options) for rank in (0, 1)]
    seen = []
    for _ in range(2):
        for loader in loaders:
            next(loader)
            seen += loader.sample_ids
    assert loaders[0].position == 8 and loaders[0].rows_of(range(8)) == seen
    assert [epoch for epoch, _ in seen] == [0] * 5 + [1] * 3


def test_resume_far_away_costs_nothing(tokenizer):
    loader = make_loader(tokenizer, make_rows(10), start=10**15)
    next(loader)
    assert loader.sample_ids[0][0] == 10**14


def test_workers_change_nothing(tokenizer):
    rows = make_rows(13, padded=4)
    alone, helped = make_loader(tokenizer, rows), make_loader(tokenizer, rows, num_workers=2)
    for _ in range(12):
        assert same(next(alone), next(helped))
    helped.load_state_dict({"position": 4})
    alone.load_state_dict({"position": 4})
    for _ in range(3):
        assert same(next(alone), next(helped))


def test_attention_mask_comes_with_padded_rows_only(tokenizer):
    rows = make_rows(6, padded=4)
    loader = make_loader(tokenizer, rows)
    seen = set()
    for _ in range(12):
        batch = next(loader)
        has_padded = any(row == 5 for _, row in loader.sample_ids)
        assert ("attention_mask" in batch) == has_padded
        if has_padded:
            expected = [[1] * 12 + [0] * 4 if row == 5 else [1] * 16 for _, row in loader.sample_ids]
            assert batch["attention_mask"].tolist() == expected and batch["attention_mask"].dtype == torch.int64
        seen.add(has_padded)
    assert seen == {True, False}


def test_loading_leaves_the_global_generators_alone(tokenizer):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    next(make_loader(tokenizer, make_rows(6)))
    next(make_loader(tokenizer, make_rows(6), num_workers=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


@pytest.mark.parametrize(
    "options", [{"micro_batch": 0}, {"accumulation": 0}, {"rank": 1}, {"seed": -1}, {"start": -4}, {"num_workers": -1}]
)
def test_loader_refuses_nonsense(tokenizer, options):
    with pytest.raises(ValueError, match={"start": "position"}.get(next(iter(options)), next(iter(options)))):
        make_loader(tokenizer, make_rows(3), **options)


def test_validation_is_the_same_for_every_run_and_world(tokenizer):
    rows = make_rows(11, padded=4)

    def batches(seed=0, **options):
        return list(validation_batches(rows, Masker(tokenizer, seed), batch_size=2, **options))

    whole = batches()
    assert [len(batch["labels"]) for batch in whole] == [2, 2, 2, 2, 2, 1]
    assert ["attention_mask" in batch for batch in whole] == [False] * 5 + [True]
    assert all(same(a, b) for a, b in zip(whole, batches(seed=9), strict=True))
    for world, limit in ((2, None), (4, None), (2, 3)):
        shares = [batches(rank=rank, world=world, max_batches=limit) for rank in range(world)]
        together = [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch]
        assert len(together) == (limit or 6) and all(same(a, b) for a, b in zip(whole, together, strict=False))


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmarks_text_is_like_english_and_a_build_of_it_is_measured(tmp_path):
    texts = list(benchmark.documents(3_000_000))
    assert texts == list(benchmark.documents(3_000_000)) and 3_000_000 < sum(len(text) + 2 for text in texts) < 3_020_000
    words = " ".join(texts).split(" ")
    assert 0.08 < len(set(words)) / len(words) < 0.14  # 0.09 in Python's documentation
    (tmp_path / "text.txt").write_text("\n\n".join(texts[:200]))
    (tmp_path / "work").mkdir()
    first = data.build([str(tmp_path / "text.txt")], tmp_path / "first", vocab_size=2000)
    row = benchmark.measure(tmp_path / "text.txt", tmp_path / "work" / "built", first / "tokenizer", num_proc=1)
    assert data.load(tmp_path / "work" / "built", verify=True).meta.fingerprint == data.load(first).meta.fingerprint
    assert row.cpu_s > 0 and row.wall_s > 0 and row.one_process == 1 and 0.05 < row.peak_memory_gb < 5
    assert 0.3 < row.disk_per_text <= row.peak_disk_per_text < 2.5
