"""How this project measures on a GPU: calls captured in a CUDA graph, timed by events, over more data than the cache holds.

A graph keeps the host out of the figure. It cycles through several sets of inputs, so that the L2 cache cannot hold what the
next call reads, and it is long enough for the cost of starting it to vanish. Host time is measured apart (`host_microseconds`).
On a CPU, where commands are only rehearsed, a clock on the host times the calls.
"""

import csv
import math
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sctd_ds.run.environment import Environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

CACHE_BYTES = 256 * 2**20  # several times any L2 cache
GRAPH_MICROSECONDS = 600.0
MAX_CALLS = 128
REPLAYS = 20
HEAD_START = 2_000_000  # clock cycles, about a millisecond, for the host to launch what is then timed
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEASURED = "measured"
"""The status of a row whose figures are complete. Any other says why they are not."""


def failure(error: Exception) -> str:
    """The status of what `error` ended, in a line, with the traceback on stderr."""
    traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"failed: {type(error).__name__}: {first_line[:120]}"


def has_failed(status: str) -> bool:
    """Whether a row's status tells of a failure, and not of something that this machine cannot measure."""
    return "failed" in status


def single_process() -> None:
    """Tell DeepSpeed that this process is the only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in alone.items():
        os.environ.setdefault(key, str(value))


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


def new_stream() -> torch.cuda.Stream | None:
    """The stream on which to make and to time calls; None on a CPU."""
    return torch.cuda.Stream() if DEVICE.type == "cuda" else None


def time_calls(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream | None) -> Timing:
    """Device time per call. What the calls differentiate must have been computed on `stream`."""
    with torch.cuda.stream(stream):
        for call in calls[:3] * 2:
            call()
    microseconds = _host_times(calls) if stream is None else _graph_times(calls, stream)
    times = torch.tensor(microseconds, dtype=torch.float64)
    return Timing(*(times.quantile(q).item() for q in (0.5, 0.2, 0.8)))


def _graph_times(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> list[float]:
    """Microseconds per call of each replay of a graph of many calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        # The device spins while the host launches: between the events it then never waits for the host.
        torch.cuda._sleep(10 * HEAD_START)
        start.record()
        for call in calls:
            call()
        end.record()
    end.synchronize()
    estimate = max(start.elapsed_time(end) * 1000 / len(calls), 1.0)
    count = min(max(len(calls), math.ceil(GRAPH_MICROSECONDS / estimate)), MAX_CALLS)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # a call that fails ends the capture
        for i in range(count):
            calls[i % len(calls)]()
    times = []
    with torch.cuda.stream(stream):
        for _ in range(REPLAYS + 3):
            torch.cuda._sleep(HEAD_START)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / count)
    return times[3:]


def _host_times(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds of each call on the host."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def host_microseconds(call: Callable[[], Any], calls: int = 50) -> float:
    """Time that one call keeps the host busy, without waiting for the GPU."""
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed * 1e6 / calls


def peak_bytes(call: Callable[[], Any]) -> int:
    """Memory that a call needs at its peak, beyond what was allocated before; 0 on a CPU, which does not count it."""
    if DEVICE.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def input_sets(bytes_per_call: int) -> int:
    """How many sets of inputs together exceed the cache."""
    return min(max(math.ceil(CACHE_BYTES / max(bytes_per_call, 1)), 1), 32)


def copy_bandwidth(size: int = 2**29) -> float:
    """Bytes per second, read and written, of the device copying `size` bytes within its own memory."""
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], new_stream())
    return 2 * source.numel() / timing.median * 1e6


def write_csv(path: Path, rows: Sequence[dict[str, Any]], environment: Environment) -> None:
    """Write the rows, each with the environment, replacing the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = asdict(environment)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *stamp], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **stamp} for row in rows)
    partial.replace(path)
