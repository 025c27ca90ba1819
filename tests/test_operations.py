"""A process that is killed while an operation compiles does not stop the next one, and only a real compilation is announced."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
from torch.utils import cpp_extension

from helpers import ROOT
from helpers.launch import free_port, launch_environment
from sctd_ds.engine.operations import compiling

LIMIT = 200
"""Seconds after which a process counts as hanging."""
LOAD = """
import sys
from torch.utils import cpp_extension
from sctd_ds.engine.operations import compiling
with compiling():
    cpp_extension.load(name="tiny", sources=[sys.argv[1]], is_python_module=False)
"""
SLOW_COMPILER = """#!/bin/sh
# Says that it compiles, and does so as soon as it may.
case " $* " in *" -c "*) touch {0}/compiles; while [ ! -e {0}/go ]; do sleep 0.1; done;; esac
exec g++ "$@"
"""
INITIALIZE = """
import sctd_ds
from helpers.bert import small_bert
config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "sctd": {}}
model = small_bert()
engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
"""
INIT_DISTRIBUTED = "from sctd_ds.engine import ranks; ranks.init_distributed()"
COMPILES = "DeepSpeed compiles its operation tiny"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The source of an operation that compiles in no time, with a folder of its own for what torch compiles."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    source = tmp_path / "tiny.cpp"
    source.write_text("int tiny() { return 1; }\n")
    return source


@contextmanager
def start(code: str, *arguments: object, **environment: str) -> Iterator[subprocess.Popen]:
    """A Python process whose standard error can be read; it is killed when the block ends, or if it hangs."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**launch_environment(), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        guard = Timer(LIMIT, process.kill)
        guard.start()
        try:
            yield process
        finally:
            guard.cancel()
            process.kill()


def test_only_a_compilation_is_announced_and_by_one_rank(tiny, monkeypatch, caplog):
    said = []
    for local_rank, changed in (("0", False), ("0", False), ("1", True), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        if changed:
            later = time.time() + 1000 * len(said)
            os.utime(tiny, (later, later))
        caplog.clear()
        with compiling():
            cpp_extension.load(name="tiny", sources=[str(tiny)], is_python_module=False)
        said.append("DeepSpeed compiles its operation tiny" in caplog.text)
    assert said == [True, False, False, True]


def test_a_compilation_that_was_killed_is_waited_for_and_its_lock_removed(tiny, tmp_path):
    """Of a killed process remain torch's lock file and, for a while, ninja and the compiler."""
    slow = tmp_path / "slow"
    slow.write_text(SLOW_COMPILER.format(tmp_path))
    slow.chmod(0o755)
    lock = Path(cpp_extension._get_build_directory("tiny", False), "lock")
    try:
        with start(LOAD, tiny, CXX=str(slow)) as killed:
            while not (tmp_path / "compiles").exists():
                assert killed.poll() is None, killed.communicate()
                time.sleep(0.05)
        assert lock.exists()
        with start(LOAD, tiny) as second:
            assert any("waiting for process" in line for line in second.stderr)
            (tmp_path / "go").touch()
            assert second.wait() == 0
    finally:
        (tmp_path / "go").touch()
    assert not lock.exists()


@pytest.mark.parametrize("code", [INIT_DISTRIBUTED, INITIALIZE], ids=["init_distributed", "initialize"])
def test_a_lock_that_a_killed_start_left_stops_nobody(tmp_path, monkeypatch, code):
    """Nor is that operation compiled, which only inference calls."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", False), "lock")
    lock.touch()
    with start(code, MASTER_PORT=str(free_port()), MASTER_ADDR="127.0.0.1") as started:
        assert started.wait() == 0, started.stderr.read()
    assert [file.name for file in lock.parent.iterdir()] == ["lock"]
