"""Everything that only a GPU can tell, in one command: `python -m benchmarks.gpu`.

Correctness first (kernels against their references, the model, a run that is stopped and continued), then whether the
shipped configurations fit, then speed. Each check is a command with a log of its own; a failure does not stop the others.
Logs and figures go to --out; `<out>/<device>/` is what belongs under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import ROOT
from sctd_ds.run.environment import Environment

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "--no-showlocals", "--tb=short")
LAUNCH = (PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", "1")
DRY_RUN = (*LAUNCH, "pretrain.py", "--dry-run", "--data", "python-docs", "--deepspeed_config")
TRAIN_STEP = (PYTHON, "-m", "benchmarks.train_step")
PASSED, CUT_OFF, NOT_STARTED = "passed", "cut off by --minutes", "not started: --minutes are over"


@dataclass(frozen=True)
class Check:
    """A command, run in the repository's root, and what it shows. It passes if it exits with 0; {out} stands for --out."""

    about: str
    command: tuple[str, ...]


CHECKS: dict[str, Check] = {
    "kernels": Check("every kernel against its torch reference", (*PYTEST, "tests/kernels")),
    "model": Check(
        "the model against its oracle, steps that never wait, a run continued bit for bit",
        (*PYTEST, "-m", "gpu", "--ignore=tests/kernels"),
    ),
    "base": Check("ds_configs/base.json fits: memory and forecast", (*DRY_RUN, "ds_configs/base.json")),
    "large": Check("ds_configs/large.json fits: memory and forecast", (*DRY_RUN, "ds_configs/large.json")),
    "kernel-speed": Check("kernels against copy bandwidth", (PYTHON, "-m", "benchmarks.kernels", "--output", "{out}")),
    "step-speed": Check(
        "BERT-large's steps against dense and Hugging Face, and where their time goes",
        (*TRAIN_STEP, "--cases", "large:512:64", "--profile", "--out", "{out}"),
    ),
    "table5": Check("the paper's Table 5 from the steps just measured", (PYTHON, "-m", "benchmarks.table5", "--out", "{out}")),
    "all-steps": Check("base and large, two lengths, two batch sizes: most of an hour", (*TRAIN_STEP, "--out", "{out}/all")),
}


def run(checks: Mapping[str, Check], out: Path, minutes: float = float("inf")) -> dict[str, str]:
    """Run the checks one after the other, each with a line when it ends; returns the result of each by name.

    minutes: for all of them together. The check that runs when they are over is killed, and the others are not started.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    results = {}
    for name, check in checks.items():
        start = time.monotonic()
        results[name] = NOT_STARTED if start >= end else run_check(check, out, out / "logs" / f"{name}.log", end - start)
        print(f"{name:13} {time.monotonic() - start:6.0f} s  {results[name]}  ({check.about})", flush=True)
    return results


def run_check(check: Check, out: Path, log: Path, seconds: float) -> str:
    """Run one check for at most `seconds`; returns its result in words."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [part.format(out=out.resolve()) for part in check.command]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what a launcher has started ends with it and frees the device
        )
        try:
            status = process.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            return f"{CUT_OFF}: {log}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return PASSED if status == 0 else f"failed with status {status}: {log}"


def main(arguments: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=f"some of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, and kill what still runs")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here, and everything in this command needs one", file=sys.stderr)
        return 2
    environment = Environment.collect()
    print(f"{environment.device}, torch {environment.torch}, triton {environment.triton}, commit {environment.commit}")
    chosen = {name: check for name, check in CHECKS.items() if not options.only or name in options.only}
    results = run(chosen, options.out, options.minutes)
    failed = [name for name, result in results.items() if result != PASSED]
    print(f"{len(results) - len(failed)} of {len(results)} passed" + (f"; look at {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
