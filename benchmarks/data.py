"""How fast text becomes training rows, and rows micro-batches: megabytes per core, memory, disk, and tokens per second.

    python -m benchmarks.data --megabytes 100 --num-proc 1 2

The text is generated, English-like in what costs time: how often words repeat, how many new ones come, marks and capitals. Each
build runs in processes of its own, which are sampled. Figures per core divide by CPU time, so that other work on the machine
changes them little; "one process" is the share of the CPU time that one process alone can do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks import harness
from sctd_ds import data
from sctd_ds.run.environment import Environment

WORDS, EXPONENT, OFFSET = 400_000, 1.25, 2.7  # of the Zipf-Mandelbrot law that the words follow
BUILD = "import json, sys; from sctd_ds import data; print('imported', flush=True); data.build(**json.loads(sys.argv[1]))"
EVERY = 0.1  # seconds between samples


def documents(size: int, seed: int = 0) -> Iterator[str]:
    """English-like documents of about `size` bytes together."""
    generator = np.random.Generator(np.random.PCG64(seed))
    onsets, vowels, codas = "b c d f g h l m n p r s t v w st tr pl ch sh".split(), "aeiou", ["", "n", "r", "s", "t", "l", "nd"]
    syllables = [onset + vowel + coda for onset in onsets for vowel in vowels for coda in codas]
    generator.shuffle(syllables)
    words = np.array([_word(rank, syllables) for rank in range(WORDS)], dtype=object)
    share = np.cumsum(1 / (np.arange(WORDS) + OFFSET) ** EXPONENT)
    held = 0
    while held < size:
        chosen = words[np.searchsorted(share, generator.random(1 << 16) * share[-1])].tolist()
        for place in generator.integers(0, len(chosen), len(chosen) // 12).tolist():
            chosen[place] += ","
        place = 0
        for sentences in generator.integers(2, 25, 100).tolist():
            document = []
            for length in generator.integers(5, 30, sentences).tolist():
                document.append(" ".join(chosen[place : place + length]).capitalize().rstrip(",") + ".")
                place += length
            if place > len(chosen):
                break
            text = " ".join(document)
            held += len(text) + 2
            yield text
            if held >= size:
                return


def _word(rank: int, syllables: list[str]) -> str:
    """The word of a rank, counted from the most frequent; frequent words are short."""
    word, rank = syllables[rank % len(syllables)], rank // len(syllables)
    while rank:
        word, rank = word + syllables[(rank - 1) % len(syllables)], (rank - 1) // len(syllables)
    return word


@dataclass(frozen=True)
class Row:
    """One build. Megabytes are 10**6 bytes of text."""

    text_mb: float
    tokenizer: str
    num_proc: int
    wall_s: float
    cpu_s: float
    mb_per_s: float
    mb_per_s_per_core: float
    one_process: float
    peak_memory_gb: float
    peak_disk_per_text: float
    disk_per_text: float


def measure(text: Path, out: Path, tokenizer: Path | None, num_proc: int) -> Row:
    """Build `out` from `text`, and sample the processes and the folders while it runs."""
    options = {
        "sources": [str(text)],
        "out": str(out),
        "tokenizer": str(tokenizer) if tokenizer else None,
        "num_proc": num_proc,
    }
    process = subprocess.Popen([sys.executable, "-c", BUILD, json.dumps(options)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "imported\n"
    main = psutil.Process(process.pid)
    start, before = time.perf_counter(), _cpu(main)
    used: dict[int, float] = {}
    memory = disk = 0
    while process.poll() is None:
        together = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in [main, *main.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    used[member.pid] = _cpu(member)
                    together += member.memory_full_info().pss
        memory, disk = max(memory, together), max(disk, _size(out.parent, text))
        time.sleep(EVERY)
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"the build ended with {process.returncode}")
    alone = used[main.pid] - before
    cpu, size = sum(used.values()) - before, text.stat().st_size
    return Row(
        text_mb=size / 1e6,
        tokenizer="given" if tokenizer else "trained",
        num_proc=num_proc,
        wall_s=wall,
        cpu_s=cpu,
        mb_per_s=size / 1e6 / wall,
        mb_per_s_per_core=size / 1e6 / cpu,
        one_process=alone / cpu if num_proc > 1 else 1.0,
        peak_memory_gb=memory / 1e9,
        peak_disk_per_text=disk / size,
        disk_per_text=_size(out, text) / size,
    )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _size(folder: Path, text: Path) -> int:
    """Bytes of all files below a folder, without the text."""
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over what a build deletes meanwhile
        for path in (Path(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path != text else 0
    return total


def loading(built: Path, workers: int, micro_batch: int = 32, seconds: float = 10.0) -> tuple[float, float]:
    """Tokens that one rank's Loader gives per second by the clock, and per second of CPU time."""
    packed = data.load(built)
    masker = data.Masker(packed.tokenizer, seed=0)
    loader = data.Loader(
        packed.train, masker, micro_batch=micro_batch, accumulation=1, rank=0, world=1, seed=0, num_workers=workers
    )
    next(loader)
    tokens, start, before = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        tokens += next(loader)["input_ids"].numel()
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - before)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, and write it to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of text to generate (default: %(default)s)")
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1, 2], help="processes, one build each (default: 1 2)")
    parser.add_argument(
        "--tokenizer", nargs="+", choices=("trained", "given"), default=["trained", "given"], help="builds to measure"
    )
    parser.add_argument("--folder", type=Path, help="where to work; needs twice the text (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "data-cpu" / "results.csv", help="(default: %(default)s)")
    given = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="data-benchmark-", dir=given.folder) as name:
        folder = Path(name)
        text = folder / "text.txt"
        with text.open("w") as file:
            file.writelines(document + "\n\n" for document in documents(given.megabytes * 10**6))
        first = data.build([str(text)], folder / "first") if "trained" not in given.tokenizer else None
        for kind in sorted(given.tokenizer, reverse=True):  # trained, then given
            for num_proc in given.num_proc:
                work = folder / "work"
                work.mkdir()
                tokenizer = first / "tokenizer" if first and kind == "given" else None
                row = measure(text, work / "built", tokenizer, num_proc)
                rows.append(row)
                print(
                    "  ".join(
                        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
                        for key, value in asdict(row).items()
                    ),
                    flush=True,
                )
                if first is None:
                    first = (work / "built").rename(folder / "first")
                shutil.rmtree(work)
        assert first is not None
        for workers in (0, 1):
            by_clock, by_cpu = loading(first, workers)
            print(f"loading, num_workers {workers}: {by_clock:,.0f} tokens/s per rank, {by_cpu:,.0f} per second of CPU time")
    harness.write_csv(given.out, [asdict(row) for row in rows], Environment.collect())
    return 0


if __name__ == "__main__":
    sys.exit(main())
