"""Real launches: the `deepspeed` command on this machine, with a clean environment and a port of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers import ROOT

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    script: Path | str, *arguments: object, ranks: int, device: str = "cpu", timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus RANKS script arguments` to its end; stdout and stderr come back together, in `stdout`.

    Raises subprocess.TimeoutExpired after `timeout` seconds, with every process of the launch ended, and AssertionError if
    the run leaves shared memory behind.

    Args:
        script: a file, or the name of a module.
        device: DeepSpeed's name for it, "cpu" or "cuda".
    """
    command = launch_command(script, *arguments, ranks=ranks)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=launch_environment(device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:  # out of time, or Ctrl-C: no rank may outlive its test
            os.killpg(process.pid, signal.SIGKILL)
            raise
    port = command[command.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")), output[-3000:]
    return subprocess.CompletedProcess(command, process.returncode, output)


def launch_command(script: Path | str, *arguments: object, ranks: int) -> list[str]:
    """The command of `launch`, with a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    if isinstance(script, str):
        launcher.append("--module")
    return [*launcher, str(script), *map(str, arguments)]


def launch_environment(device: str = "cpu") -> dict[str, str]:
    """This process's environment without its own rank and kernel interpreter; `helpers` and the tests can be imported."""
    environment = {k: v for k, v in os.environ.items() if k not in (*LAUNCHER_VARIABLES, "TRITON_INTERPRET")}
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1"}


def run_pretrain(arguments: Sequence[object], log: Path, folder: Path, port: str) -> None:
    """Be a run of one rank, and end this process as pretrain.py would; it was forked for that. log: gets stdout and stderr."""
    from sctd_ds.pretrain import run_and_report

    os.setsid()
    os.chdir(folder)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run_and_report([str(argument) for argument in arguments]))
