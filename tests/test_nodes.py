"""Two nodes on one machine: two of DeepSpeed's launchers, each in a working folder of its own."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.launch import free_port, launch_environment
from helpers.runs import write_settings
from sctd_ds import data
from sctd_ds.engine import checkpoint

FEW = {"steps": 2, "validation_every": 0}
TIME_LIMIT = 400


@pytest.fixture
def nodes(tmp_path) -> list[Path]:
    """Two working folders with the same small configuration."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_settings(folder / "mini.json", pretrain=FEW)
    return folders


def launch(nodes: list[Path], *arguments: object) -> list[tuple[int, str]]:
    """Run pretrain.py with a rank on each node; returns each launcher's exit status and its output."""
    world = base64.urlsafe_b64encode(json.dumps({folder.name: [0] for folder in nodes}).encode()).decode()
    where = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    script = [ROOT / "pretrain.py", "--deepspeed_config", "mini.json", *arguments]
    how = {"env": launch_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with ExitStack() as stack:
        launchers = []
        for number, folder in enumerate(nodes):
            command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--node_rank={number}", *where, *map(str, script)]
            process = stack.enter_context(subprocess.Popen(command, cwd=folder, start_new_session=True, **how))
            stack.callback(end, process)
            launchers.append(process)
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in launchers]
    return [(process.returncode, output) for process, output in zip(launchers, outputs, strict=True)]


def end(process: subprocess.Popen) -> None:
    """Kill a launcher and its rank, if they are still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_nodes_with_one_folder_write_one_checkpoint(nodes, small_data, tmp_path):
    done = launch(nodes, "--data", small_data, "--output", tmp_path / "run")
    assert [status for status, _ in done] == [0, 0], done
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert len(list(saved.glob("*_optim_states.pt"))) == 2 and checkpoint.verify(saved) is None


def test_nodes_with_folders_of_their_own_are_refused(nodes, small_data):
    first, second = launch(nodes, "--data", small_data, "--output", "run")
    assert first[0] == second[0] == 2
    assert "give --output a folder that all nodes share" in first[1] and "(on rank 1)" in first[1]
    assert [path.name for folder in nodes for path in folder.iterdir()] == ["mini.json", "mini.json"]


def test_a_node_without_the_data_is_named_with_the_remedy(nodes, small_data, tmp_path):
    text = shutil.copy(small_data.parent / "text.txt", tmp_path)
    first, second = launch(nodes, "--data", text, "--set", "pretrain.vocab_size=300", "--output", tmp_path / "run")
    assert first[0] == second[0] == 2
    assert f"{nodes[1] / 'data' / 'cache'}" in first[1] and "build them with `python -m sctd_ds.data build`" in first[1]


def test_a_node_that_refuses_its_input_does_not_keep_the_others_waiting(nodes, small_data, tmp_path):
    shutil.copytree(small_data, nodes[0] / "built")
    first, second = launch(nodes, "--data", "built", "--output", tmp_path / "run")
    assert first[0] == second[0] == 2
    assert "pretrain: built: no such file or folder" in first[1] and "(on rank 1)" in first[1]
    assert second[1].count("no such file or folder") == 1


def test_nodes_with_different_data_are_refused(nodes, small_data, tmp_path):
    documents = (small_data.parent / "text.txt").read_text().split("\n\n")
    (tmp_path / "other.txt").write_text("\n\n".join(reversed(documents)))
    for folder, text in zip(nodes, (small_data.parent / "text.txt", tmp_path / "other.txt"), strict=True):
        data.build([str(text)], folder / "built", vocab_size=300, seq_length=32, validation_fraction=0.1)
    first, second = launch(nodes, "--data", "built", "--output", tmp_path / "run")
    assert first[0] == second[0] == 2 and "holds other data than that of the first rank" in first[1]
