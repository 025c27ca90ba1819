"""Everything that only a GPU can tell, in one command: `python -m benchmarks.gpu`.

What matters most comes first: are the kernels and the model right, which attention is fast, what do the steps cost, does a
stopped run continue bit for bit, do the shipped configurations fit. Each part is a command with a time limit and a log of its
own. A failure stops no other part, and the next call goes on with the first part that has not ended: <out>/state.json knows.

    python -m benchmarks.gpu --plan 30 --list       # the parts that have a place in 30 minutes, and their commands
    python -m benchmarks.gpu --plan 30              # at most 9 minutes a call: call it until it says that nothing is left
    python -m benchmarks.gpu --plan 30 --rehearse   # every part on this machine's CPU, at toy size
    python -m benchmarks.gpu --only kernels 3       # some parts, also again

Logs and figures go to --out; `<out>/<part>/<device>/` is what belongs under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
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
DRY_RUN = (PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "pretrain.py", "--dry-run", "--deepspeed_config")
STEPS = (PYTHON, "-m", "benchmarks.train_step", "--out", "{out}", "--cases", "{case}")
KERNELS = (PYTHON, "-m", "benchmarks.kernels", "--output", "{out}")
RESUMED = "tests/test_pretrain.py::test_resumed_run_in_16_bits_is_the_run_that_never_stopped"
PASSED = "passed"
MINUTES_A_CALL = 9.0
GRACE_S = 10.0
"""What an interrupted part gets to end its own children, before it is killed."""
SUMMARY_CHARACTERS = 10_000


@dataclass(frozen=True)
class Part:
    """A command, run in the repository's root, and what it shows. It passes if it exits with 0.

    Words in braces are filled in: {out} by the part's folder, the others from `AT_FULL_SIZE` or `REHEARSED`; a word that
    becomes empty is left out.
    """

    about: str
    minutes: float
    command: tuple[str, ...]

    def words(self, out: Path, sizes: Mapping[str, str]) -> list[str]:
        filled = (word.format(out=out, **sizes) for word in self.command)
        return [word for word in filled if word]


PARTS: dict[str, Part] = {
    "kernels": Part("every kernel against its torch reference", 7, (*PYTEST, "{kernel_tests}")),
    "operators": Part(
        "attention by backend, with the dropout that it really applies, and the matrix products",
        4,
        (PYTHON, "-m", "benchmarks.operators", "--out", "{out}", "{model}", "{length}", "{batch}", "{dtype}"),
    ),
    "model": Part(
        "the model against its oracle, and steps that never wait for the device",
        6,
        (*PYTEST, "-m", "gpu", "--ignore=tests/kernels", f"--deselect={RESUMED}"),
    ),
    "steps": Part(
        "forward and backward of BERT-large's steps against dense and Hugging Face, and where their time goes",
        8.5,
        (*STEPS, "--no-engine", "--variants", "huggingface;dense;drop;align;spread", "{profile}"),
    ),
    "engine-16": Part(
        "whole optimizer steps of 16 micro-batches",
        8,
        (*STEPS, "--engine", "--accumulation", "{many}", "--steps", "4", "--variants", "huggingface;dense;drop;align"),
    ),
    "engine-1": Part(
        "whole optimizer steps of one micro-batch, and where their time goes",
        7,
        (*STEPS, "--engine", "--variants", "huggingface;dense;drop;align", "{profile}"),
    ),
    "resume": Part("a run that stops and continues bit for bit", 5, (*PYTEST, RESUMED + "[{device}]")),
    "large": Part("ds_configs/large.json fits: memory and forecast", 5, (*DRY_RUN, "{large}", "{rows}", "--data", "{data}")),
    "kernel-speed": Part("kernels against copy bandwidth", 5, (*KERNELS, "{quick}")),
    "eager": Part(
        "what torch.compile and the one-pass backward are worth",
        6,
        (*STEPS, "--no-engine", "--variants", "drop;drop, one pass;dense, eager;drop, eager;drop, one pass, eager"),
    ),
    "deterministic": Part(
        "what kernels that repeat bit for bit cost", 4, (*STEPS, "--no-engine", "--variants", "drop", "--deterministic")
    ),
    "rivals": Part(
        "Hugging Face compiled, and DeepSpeed's random-LTD",
        8,
        (*STEPS, "--engine", "--variants", "huggingface;huggingface compiled;random-LTD;drop"),
    ),
    "base": Part("ds_configs/base.json fits: memory and forecast", 4, (*DRY_RUN, "{base}", "{rows}", "--data", "{data}")),
    "table5": Part(
        "the paper's Table 5", 8.5, (PYTHON, "-m", "benchmarks.table5", "--out", "{out}", "--measure", "{model}", "{length}")
    ),
    "all-kernels": Part("kernels at every shape", 30, (*KERNELS, "{every_shape}")),
    "all-steps": Part(
        "base and large, two lengths, two batch sizes", 90, (PYTHON, "-m", "benchmarks.train_step", "--out", "{out}", "{some}")
    ),
}
"""By name, the most important first."""

AT_FULL_SIZE = {
    "kernel_tests": "tests/kernels",
    "model": "--model=large",
    "length": "--length=512",
    "batch": "--batch=64",
    "dtype": "--dtype=fp16",
    "case": "large:512:64",
    "some": "",
    "many": "16",
    "profile": "--profile",
    "device": "cuda",
    "large": "ds_configs/large.json",
    "base": "ds_configs/base.json",
    "rows": "",
    "data": "python-docs",
    "quick": "--quick",
    "every_shape": "",
}
REHEARSED = {
    "kernel_tests": "tests/kernels/test_kernel_api.py",
    "model": "--model=toy",
    "length": "--length=32",
    "batch": "--batch=4",
    "dtype": "--dtype=fp32",
    "case": "toy:32:4",
    "some": "--cases=toy:32:4",
    "many": "2",
    "profile": "",
    "device": "cpu",
    "large": "ds_configs/tiny.json",
    "base": "ds_configs/tiny.json",
    "rows": "--set=train_batch_size=2",
    "data": "python-docs:100KB",
    "quick": "--rehearse",
    "every_shape": "--rehearse",
}


class State:
    """How each part ended and how long it took, in a file that the next call reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.results, self.seconds = found["results"], found["seconds"]

    def record(self, name: str, result: str, seconds: float) -> None:
        self.results[name] = result
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"results": self.results, "seconds": self.seconds}, indent=1), encoding="utf-8")
        partial.replace(self.path)


def run(parts: Sequence[str], out: Path, sizes: Mapping[str, str], call_s: float, plan_s: float) -> list[str]:
    """Run the parts one after the other; returns those that this call ran.

    call_s: seconds for this call, which ends before the first part whose limit does not fit. plan_s: for all calls together;
    a part that does not fit is left out, and a shorter one may take its place.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    state = State(out / "state.json")
    start, ran = time.monotonic(), []
    for name in parts:
        limit = 60 * PARTS[name].minutes
        if limit > min(call_s, plan_s - sum(state.seconds.values())):
            print(f"{name:14} left out: it may take {PARTS[name].minutes:g} min, more than --minutes or what is left of --plan")
            continue
        if limit > call_s - (time.monotonic() - start):
            print(f"{name:14} comes next: the same command continues")
            break
        print(f"{name:14} {PARTS[name].about}", flush=True)
        begin = time.monotonic()
        result = run_part(PARTS[name].words(out.resolve() / name, sizes), out / "logs" / f"{name}.log", limit)
        state.record(name, result, time.monotonic() - begin)
        ran.append(name)
    return ran


def run_part(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run one command for at most `seconds`; returns its result in words. Only its own process group is ever ended."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that what a launcher has started ends with it and frees the device
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds / 60:g} min: {log}"
        finally:
            end_group(process)
    return PASSED if status == 0 else f"failed with status {status}: {log}"


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process group: as Ctrl-C does, so that a test ends its own launches, then for good."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):  # nothing is left, or it does not listen
        try:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_S)
        finally:  # also after one more Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def summary(parts: Sequence[str], ran: Sequence[str], out: Path) -> str:
    """How every part ended, and the ends of the logs that this call wrote: short enough for a terminal that keeps little."""
    state = State(out / "state.json")
    lines = []
    for name in ran:
        text = (out / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        tail = text[-SUMMARY_CHARACTERS // len(ran) :].strip()
        lines.append(f"\n=== {name}: {state.results[name]}\n{tail}")
    lines.append("")
    for name in parts:
        lines.append(f"{name:14} {state.seconds.get(name, 0):6.0f} s  {state.results.get(name, 'not run yet')}")
    return "\n".join(lines)


def chosen(names: Sequence[str] | None) -> list[str]:
    """Parts by name or by number, from 1; all for None. Raises SystemExit for one that does not exist."""
    by_number = {str(number): name for number, name in enumerate(PARTS, start=1)}
    for name in names or ():
        if name not in PARTS and name not in by_number:
            raise SystemExit(f'unknown part "{name}": expected a number up to {len(PARTS)} or one of {", ".join(PARTS)}')
    return [by_number.get(name, name) for name in names or PARTS]


def main(arguments: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts by name or number, whatever earlier calls did")
    parser.add_argument("--plan", type=float, metavar="MINUTES", help="what all calls together may take; default: no limit")
    parser.add_argument(
        "--minutes", type=float, help=f"what this call may take; default: {MINUTES_A_CALL:g} with --plan, else no limit"
    )
    parser.add_argument("--list", action="store_true", help="print the parts with their limits and commands, and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="every part at toy size on this machine's CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/gpu, or runs/gpu-rehearsal")
    options = parser.parse_args(arguments)
    sizes = REHEARSED if options.rehearse else AT_FULL_SIZE
    out = options.out or Path("runs/gpu-rehearsal" if options.rehearse else "runs/gpu")
    plan_s = 60 * (options.plan or float("inf"))
    call_s = 60 * (options.minutes or (MINUTES_A_CALL if options.plan and not options.rehearse else float("inf")))
    names = [name for name in chosen(options.only) if options.only or 60 * PARTS[name].minutes <= min(plan_s, call_s)]
    if options.list:
        for name in names:
            print(f"{list(PARTS).index(name) + 1:2} {name:14} at most {PARTS[name].minutes:g} min: {PARTS[name].about}")
            print(f"   {shlex.join(PARTS[name].words(out / name, sizes))}")
        return 0
    if options.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    elif not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --rehearse runs every part on a CPU, at toy size", file=sys.stderr)
        return 2
    environment = Environment.collect()
    print(f"{environment.device}, torch {environment.torch}, triton {environment.triton}, commit {environment.commit}")
    ended = {} if options.only else State(out / "state.json").results
    ran = run([name for name in names if name not in ended], out, sizes, call_s, plan_s)
    print(summary(names, ran, out))
    results = State(out / "state.json").results
    failed = [name for name in names if results.get(name, PASSED) != PASSED]
    left = [name for name in names if name not in results]
    passed = len(names) - len(failed) - len(left)
    print(f"{passed} of {len(names)} passed" + (f"; look at {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
