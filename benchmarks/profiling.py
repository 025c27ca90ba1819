"""Where a step's device time goes, by category of work, from one torch.profiler trace."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

UPDATE = "optimizer update"
"""Name of the profiler range around the engine's update: what is launched inside it is the optimizer's."""

# The first pattern that matches a kernel's name decides: the names of flash attention also mention cutlass.
METHOD, HEAD = "selection, routing, KL, table", "head and loss"
ELEMENTWISE, OPTIMIZER, GAPS = "elementwise, norm, dropout, other", "optimizer", "gaps (device idle)"
CATEGORIES = (
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.I)),
    ("communication", re.compile(r"nccl", re.I)),
    (METHOD, re.compile(r"take_rows|split_rows|select_tokens|softmax_kl|record_losses|update_scores", re.I)),
    (HEAD, re.compile(r"cross_entropy|nll_loss|log_?softmax", re.I)),
    ("GEMM", re.compile(r"gemm|nvjet|cutlass|xmma|wgmma|splitk|cublas|triton_tem", re.I)),
    ("copy and fill", re.compile(r"memcpy|memset|copy_kernel|CatArray|FillFunctor", re.I)),
)
MATRIX_PRODUCTS = re.compile(r"aten::(addmm|mm|bmm|linear|matmul|_addmm)")


@dataclass
class Breakdown:
    """ms per step. wall: first to last device activity. Where streams overlap, categories exceed wall - gaps in sum."""

    wall: float
    gaps: float
    categories: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, ms per step, launches per step), the longest first."""

    def text(self, top: int = 25) -> str:
        lines = [f"{self.wall:.2f} ms a step under the profiler"]
        for name, ms in [*sorted(self.categories.items(), key=lambda item: -item[1]), (GAPS, self.gaps)]:
            lines.append(f"  {name:<36}{ms:>9.3f} ms {ms / self.wall:>7.1%}")
        if top:
            lines.append(f"  the {min(top, len(self.kernels))} longest kernels: ms and launches per step")
        lines += [f"  {ms:>9.3f} {count:>7.1f}  {name[:110]}" for name, ms, count in self.kernels[:top]]
        return "\n".join(lines)


def profile_steps(step: Callable[[], None], *, head_rows: int, vocabulary: int, steps: int = 3) -> Breakdown:
    """Trace `steps` steps after an untraced one. head_rows: labelled tokens of a micro-batch, which identify the head.

    Needs a CUDA device; raises ValueError without one.
    """
    if not torch.cuda.is_available():
        raise ValueError("--profile needs a GPU: run it on a machine with a CUDA device")
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as trace:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return break_down(events, steps, head_rows=head_rows, vocabulary=vocabulary)


def break_down(events: Iterable[Mapping[str, Any]], steps: int, *, head_rows: int, vocabulary: int) -> Breakdown:
    """Sort a Chrome trace's device activities by category of work. Times in the trace are in microseconds."""
    on_device, launches, operators, updates = [], {}, {}, []
    for event in events:
        source, arguments = event.get("cat"), event.get("args", {})
        if source in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_device.append(event)
        elif source in ("cuda_runtime", "cuda_driver"):
            launches[arguments.get("correlation")] = event["ts"]
        elif source == "cpu_op":
            operators[arguments.get("External id")] = event
        elif source == "user_annotation" and event["name"] == UPDATE:
            updates.append((event["ts"], event["ts"] + event["dur"]))
    if not on_device:
        raise ValueError("the trace holds no device activity: is another profiler attached to the device?")

    categories: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in on_device:
        arguments, ms = event.get("args", {}), event["dur"] / 1e3 / steps
        launched = launches.get(arguments.get("correlation"))
        if launched is not None and any(start <= launched <= end for start, end in updates):
            category = OPTIMIZER
        elif _of_head(operators.get(arguments.get("External id")), head_rows, vocabulary):
            category = HEAD
        else:
            category = next((name for name, pattern in CATEGORIES if pattern.search(event["name"])), ELEMENTWISE)
        categories[category] += ms
        kernels[event["name"]][0] += ms
        kernels[event["name"]][1] += 1 / steps
    start = min(event["ts"] for event in on_device)
    wall = max(event["ts"] + event["dur"] for event in on_device) - start
    idle = wall - _covered((event["ts"], event["ts"] + event["dur"]) for event in on_device)
    longest = sorted(((name, ms, count) for name, (ms, count) in kernels.items()), key=lambda item: -item[1])
    return Breakdown(wall / 1e3 / steps, idle / 1e3 / steps, dict(categories), longest)


def _of_head(operator: Mapping[str, Any] | None, head_rows: int, vocabulary: int) -> bool:
    """Whether a matrix product works on the labelled rows or the vocabulary, judged by its input shapes."""
    if operator is None or not MATRIX_PRODUCTS.match(operator["name"]):
        return False
    shapes = [shape for shape in operator.get("args", {}).get("Input Dims", []) if shape and isinstance(shape[0], int)]
    return any(head_rows in shape or vocabulary in shape for shape in shapes)


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
