"""Everything that only a GPU can tell, in one command: `python -m benchmarks.gpu`.

Correctness first (kernels against their twins, the model, a run that is stopped and continued), then whether the shipped
configurations fit, then speed. Each check is a command of its own with a log; one that fails stops none of the others.
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

from benchmarks.harness import ROOT, Environment

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "--no-showlocals", "--tb=short")
DRY_RUN = (PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "pretrain.py", "--dry-run", "--data", "python-docs",
           "--deepspeed_config")  # fmt: skip
TRAIN_STEP = (PYTHON, "-m", "benchmarks.train_step")
PASSED, CUT_OFF, NOT_STARTED = "passed", "cut off by --minutes", "not started: --minutes are over"


@dataclass(frozen=True)
class Check:
    """A command, run in the repository's root, and what it tells. It passes if it exits with 0; {out} becomes --out."""

    about: str
    command: tuple[str, ...]


CHECKS: dict[str, Check] = {
    "kernels": Check("every kernel against its torch twin", (*PYTEST, "tests/kernels")),
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
    """Run the checks one after the other, each with a line when it ends; returns what became of each by name.

    minutes: for all of them together; the one that is running then is ended, and the others are not started.
    """
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + 60 * minutes, {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHONUNBUFFERED": "1"}
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + inherited
    for name, check in checks.items():
        start = time.monotonic()
        if start >= end:
            results[name] = NOT_STARTED
        else:
            log = logs / f"{name}.log"
            command = [part.format(out=out.resolve()) for part in check.command]
            with log.open("w", encoding="utf-8") as file:
                # A session of its own, so that what a launcher has started ends with it and frees the device.
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                           start_new_session=True)  # fmt: skip
                try:
                    status = process.wait(None if end == float("inf") else end - start)
                    results[name] = PASSED if status == 0 else f"failed with status {status}: {log}"
                except subprocess.TimeoutExpired:
                    results[name] = f"{CUT_OFF}: {log}"
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        print(f"{name:13} {time.monotonic() - start:6.0f} s  {results[name]}  ({check.about})", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=f"some of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing, and end what runs, after these")
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
