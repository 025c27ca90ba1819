"""A signal to any process of a run ends all of them, with a checkpoint that says so; see the table in docs/reliability.md."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers import ROOT
from helpers.launch import launch_command, launch_environment
from helpers.runs import write_settings
from sctd_ds.run import metrics, stop

STEPS = 5000
"""More than a run takes before it is stopped."""


def hear_all_signals() -> None:
    """As a process that a user starts: the tests may run under nohup or in the background, where some are ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def training(small_data: Path, folder: Path) -> Iterator[dict[str, psutil.Process]]:
    """The processes of a run of two ranks that has trained some steps: "deepspeed", "launch.py", "rank 0", "rank 1"."""
    config = write_settings(folder / "mini.json", pretrain={"steps": STEPS, "save_every": 0, "validation_every": 0})
    command = launch_command(
        ROOT / "pretrain.py", "--deepspeed_config", config, "--data", small_data, "--output", folder / "run", ranks=2
    )
    processes: dict[str, psutil.Process] = {}
    with (folder / "log").open("w") as log:
        runner = psutil.Popen(
            command,
            cwd=ROOT,
            env=launch_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=hear_all_signals,
        )
        try:
            while len(metrics.read(folder / "run" / "metrics.jsonl")) < 5:
                assert runner.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(0.05)
            (launcher,) = runner.children()
            workers = sorted(launcher.children(), key=lambda worker: worker.environ()["RANK"])
            processes |= {"deepspeed": runner, "launch.py": launcher, "rank 0": workers[0], "rank 1": workers[1]}
            yield processes
        finally:
            for process in (runner, *processes.values()):
                if process.is_running():
                    process.kill()
            runner.wait()


def signalled(small_data: Path, folder: Path, who: str, number: int) -> tuple[int | None, list[int]]:
    """The exit status of `deepspeed` and the steps that were saved, once a signal to `who` has ended every process."""
    with training(small_data, folder) as processes:
        processes[who].send_signal(number)
        _, alive = psutil.wait_procs(list(processes.values()), timeout=200)
        assert not alive, (alive, (folder / "log").read_text()[-3000:])
        saved = [int(path.name.removeprefix("step_")) for path in (folder / "run" / "checkpoints").glob("step_*")]
        return processes["deepspeed"].wait(), saved


@pytest.mark.parametrize(
    ("who", "number", "status"),
    [
        ("deepspeed", signal.SIGTERM, -signal.SIGTERM),
        ("launch.py", signal.SIGKILL, 0),  # DeepSpeed's runner passes on positive statuses only
        ("rank 1", signal.SIGHUP, 143),
    ],
)
def test_a_signal_to_any_process_ends_all_with_a_checkpoint(small_data, tmp_path, who, number, status):
    ended, saved = signalled(small_data, tmp_path, who, number)
    assert ended == status and len(saved) == 1 and saved[0] < STEPS
    assert f"stopped after step {saved[0]}" in (tmp_path / "log").read_text()


@pytest.fixture
def handlers():
    """Puts the handlers of the signals back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nohup_keeps_its_promise_and_a_terminal_that_closes_stops_the_run(handlers):
    engine = SimpleNamespace(stop_requested=False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop.listen(engine)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not engine.stop_requested
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop.listen(engine)
    os.kill(os.getpid(), signal.SIGHUP)
    assert engine.stop_requested


@pytest.mark.parametrize("launched", [False, True])
def test_a_rank_ends_with_its_launcher_and_outlives_the_shell_that_started_it_by_hand(monkeypatch, launched):
    launcher = stop.Launcher(launched)
    monkeypatch.setattr(psutil.Process, "ppid", lambda _: 1)
    assert launcher.is_lost() == launched
