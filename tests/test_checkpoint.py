"""Checkpoints in which something is wrong: damage of every kind is named, and no file runs code. Nothing is launched."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import sctd_ds
from helpers.bert import small_bert
from helpers.runs import write_settings
from sctd_ds.engine import checkpoint, ranks, reader
from sctd_ds.eval.sources import EvalError
from sctd_ds.eval.store import Model

# What verification finds


def write_checkpoint(folder: Path) -> Path:
    """Files as a run of two ranks leaves them, with little in them."""
    folder.mkdir(parents=True)
    names = ["mp_rank_00_model_states.pt", "zero_to_fp32.py"]
    for rank in range(2):
        names += [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", f"sctd_random_rank{rank:05d}.pt"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes(range(number, 100)))
    content = {"settings": {"pretrain.stages": 1}, "world_size": 2, "step": 3, "files": sorted(names)}
    (folder / "settings.json").write_text(json.dumps(content))
    checkpoint._write_manifest(folder)
    assert checkpoint.verify(folder) is None
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoints" / "step_00000003")


def test_every_flipped_bit_of_a_manifest_is_noticed(saved):
    """Many flips leave no JSON, or no UTF-8; some leave another name, size or digest."""
    file, draw = saved / "manifest.json", random.Random(0)
    written = file.read_bytes()
    for _ in range(400):
        place, bit = draw.randrange(len(written)), draw.randrange(8)
        file.write_bytes(written[:place] + bytes([written[place] ^ 1 << bit]) + written[place + 1 :])
        assert isinstance(checkpoint.verify(saved), str), (place, bit)


SHAPES = ["{}", "[]", "null", "7", '"x"', "[" * 100_000, '{"a": 1}', '{"settings.json": [1]}', "1" * 5000, "\ud800", "", "\0"]


@pytest.mark.parametrize("content", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("name", ["manifest.json", "settings.json"])
def test_any_content_of_a_manifest_or_settings_is_named_and_an_older_checkpoint_is_used(saved, caplog, name, content):
    ranks.init_distributed()
    older = write_checkpoint(saved.parent / "step_00000002")
    (saved / name).write_bytes(content.encode(errors="surrogatepass"))
    if name == "settings.json":
        checkpoint._write_manifest(saved)
    assert checkpoint.find(saved.parent, "auto") == older
    assert str(saved) in caplog.text and "skipping step_00000003" in caplog.text


@pytest.mark.parametrize("name", ["settings.json", "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_file_that_is_gone_from_the_manifest_too_is_missed(saved, name):
    entries = json.loads((saved / "manifest.json").read_text())
    del entries[name]
    (saved / "manifest.json").write_text(json.dumps(entries))
    assert f"{name} is not in the checkpoint's manifest" in checkpoint.verify(saved)
    (saved / name).unlink()
    assert re.search(f"{name} is missing|must list settings.json and a model", checkpoint.verify(saved))


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("/")], ids=["file", "pipe", "link"])
@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt"])
def test_only_files_of_the_manifest_are_accepted_and_only_as_files(saved, name, make):
    (saved / name).unlink(missing_ok=True)
    make(saved / name)
    assert name in checkpoint.verify(saved)


def test_a_path_that_cannot_be_is_no_checkpoint(tmp_path):
    for name in ("a\0b", "x" * 5000, ""):
        assert isinstance(checkpoint.verify(tmp_path / name), str)


# What a file may call


class Malice:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What a pickle of Malice would leave behind."""
    mark = tmp_path / "executed"
    torch.save(Malice(mark), tmp_path / "trial.pt")
    torch.load(tmp_path / "trial.pt", weights_only=False)
    mark.unlink()
    return mark


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    """The settings and the folder of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    config = write_settings(folder / "mini.json", pretrain={"data": str(small_data), "steps": 2, "validation_every": 0})
    assert pretrain.run_and_report(["--deepspeed_config", str(config), "--output", str(folder / "run")]) == 0
    return config, folder / "run"


def plant(folder: Path, name: str, mark: Path, zipped: bool) -> None:
    """Put Malice into a file of a checkpoint, and into its manifest, as its author would."""
    torch.save({"module": Malice(mark)}, folder / name, _use_new_zipfile_serialization=zipped)
    checkpoint._write_manifest(folder)
    assert checkpoint.verify(folder) is None


FILES = ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "sctd_random_rank00000.pt"]


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "resume") for name in FILES), *((name, "start-from") for name in FILES[:2])]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_run_calls_nothing_that_a_file_names(run, tmp_path, capsys, mark, name, how, zipped):
    config, finished = run
    shutil.copytree(finished, tmp_path / "copy")
    of_step = tmp_path / "copy" / "checkpoints" / ("step_00000002" if how == "resume" else "step_00000001")
    plant(of_step, name, mark, zipped)
    where = ["copy"] if how == "resume" else ["new", "--start-from", str(of_step)]
    assert pretrain.run_and_report(["--deepspeed_config", str(config), "--output", str(tmp_path / where[0]), *where[1:]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(of_step / name) in error and "it calls posix.system" in error
    assert not mark.exists()


def test_a_run_reads_no_universal_checkpoint(run, tmp_path, capsys):
    """DeepSpeed would read it past the engine's reader."""
    config, finished = run
    shutil.copytree(finished, tmp_path / "copy")
    universal = ["--set", "checkpoint.load_universal=true", "--allow-change", "checkpoint.load_universal"]
    assert pretrain.run_and_report(["--deepspeed_config", str(config), "--output", str(tmp_path / "copy"), *universal]) == 2
    assert "checkpoint.load_universal" in capsys.readouterr().err


def test_an_evaluation_calls_nothing_that_a_file_names(run, tmp_path, mark):
    copy = shutil.copytree(run[1], tmp_path / "copy")
    plant(copy / "checkpoints" / "step_00000002", FILES[0], mark, zipped=True)
    newest = Model("copy", str(copy / "model"), copy).history()[-1]
    with pytest.raises(EvalError, match=r"mp_rank_00_model_states.pt was not loaded: it calls posix.system"):
        newest.read_checkpoint()
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["{", "x" * 5000])
def test_an_evaluation_names_damaged_settings(run, tmp_path, damage):
    copy = shutil.copytree(run[1], tmp_path / "copy")
    (copy / "checkpoints" / "step_00000002" / "settings.json").write_text(damage)
    with pytest.raises(EvalError, match=r"settings.json cannot be read .*; delete the checkpoint to leave it out"):
        Model("copy", str(copy / "model"), copy).history()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02}", b"PK\x03\x04"])
def test_a_file_that_is_no_pickle_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(reader.CheckpointError, match=r"x\.pt cannot be loaded \(\w.*\)$"):
        reader.read(tmp_path / "x.pt")


# What DeepSpeed writes

PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "fp16 with a fixed scale": {"fp16": {"enabled": True, "loss_scale": 16}},
}


def make_engine(stage: int, precision: dict):
    model = small_bert(vocab_size=64, max_position_embeddings=16)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "sctd": {"keep_token_ids": [1, 2, 3, 4], "labels_per_row": 3},
        **precision,
    }
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


@pytest.fixture(scope="module")
def fp16_on_a_cpu():
    """torch has it there; DeepSpeed does not offer it because it is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        patch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.bfloat16, torch.half])
        yield


@pytest.fixture(scope="module")
def called(fp16_on_a_cpu, tmp_path_factory) -> dict[tuple[int, str], set[str]]:
    """What the files of each kind of engine call beyond torch's own; each was loaded into a second engine."""
    found = {}
    ids = torch.arange(5, 37).view(2, 16)
    labels = torch.where(torch.arange(16) < 3, ids, -100)
    for stage in (0, 1, 2):
        for name, precision in PRECISIONS.items():
            folder = tmp_path_factory.mktemp("engine")
            engine = make_engine(stage, precision)
            engine.train_batch(iter([{"input_ids": ids, "labels": labels}]))
            engine.save_checkpoint(str(folder), tag="x")
            other = make_engine(stage, precision)
            path, _ = other.load_checkpoint(str(folder), tag="x")
            pairs = zip(engine.module.parameters(), other.module.parameters(), strict=True)
            assert path is not None and all(torch.equal(one, two) for one, two in pairs)
            files = (folder / "x").glob("*.pt")
            found[stage, name] = set().union(*map(torch.serialization.get_unsafe_globals_in_checkpoint, files))
    return found


def test_the_list_of_what_may_be_called_is_what_deepspeed_writes(called):
    allowed = {f"{each.__module__}.{each.__qualname__}" for each in reader.ALLOWED}
    assert set().union(*called.values()) == allowed
    assert "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler" in called[2, "fp16"]
