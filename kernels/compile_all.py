"""Compile every kernel to machine code without a GPU: `python kernels/compile_all.py`.

The interpreter, in which the tests run on machines without a GPU, lets type errors, unsupported instructions and register spills
through; building the cubins does not. Nothing is described twice: the operators themselves are called, over every block size of
their launch tables, every dtype, aligned and not, and their launches are caught on the way to the driver. Each distinct launch
is then compiled for every architecture, and printed in one line. A kernel that spills registers makes the exit status 1.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: the interpreter has no machine code

import torch
import triton
from sctd_kernels import cross_entropy, divergence, importance, routing, selection
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
TYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as triton's own launcher would choose it."""

    kernel: JITFunction = field(compare=False)
    name: str
    label: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[int, ...]
    num_warps: int

    @classmethod
    def of_call(cls, kernel: JITFunction, label: str, args: tuple, kwargs: dict[str, Any]) -> "Launch":
        num_warps = kwargs.pop("num_warps", 4)
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, []
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    divisible.append(i)
            elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, float):
                signature[parameter.name] = parameter.annotation_type or "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(i)
        return cls(
            kernel, kernel.__name__, label, tuple(signature.items()), tuple(constants.items()), tuple(divisible), num_warps
        )

    def compile(self, architecture: int) -> Any:
        source = ASTSource(
            self.kernel,
            dict(self.signature),
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in self.divisible_by_16},
        )
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": self.num_warps})


def _floats(*shape: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    """Uninitialised memory; not aligned: an odd row length, and a start between two 16-byte boundaries."""
    if aligned:
        return torch.empty(shape, dtype=dtype)
    *rows, columns = shape
    return torch.empty(*rows, columns + 1, dtype=dtype)[..., 1:-1] if columns > 2 else torch.empty(shape, dtype=dtype)


def _powers(smallest: int, largest: int) -> Iterator[int]:
    while smallest <= largest:
        yield smallest
        smallest *= 2


def calls() -> Iterator[tuple[str, Any]]:
    """(label, call) of every launch there can be: each call launches one kernel on tensors with 2 rows of everything."""
    kept, slot = torch.empty(2, 16, dtype=torch.int32), torch.empty(2, 32, dtype=torch.int32)
    for dtype in FLOATS:
        name = TYPE_NAMES[dtype]
        for D in _powers(routing.MIN_BLOCK_D, routing.MAX_BLOCK_D):
            for aligned in (True, False):
                x = _floats(2, 32, D, dtype=dtype, aligned=aligned)
                y = _floats(2, 16, D, dtype=dtype, aligned=aligned)
                yield f"{name} gather", lambda x=x: routing.gather(x, kept, slot)
                yield f"{name} merge", lambda x=x, y=y: routing.merge(x, y, kept, slot)
                yield f"{name} unmerge x", lambda x=x: routing.unmerge(x, kept, slot, True, False)
                yield f"{name} unmerge", lambda x=x: routing.unmerge(x, kept, slot, True, True)
        for D in _powers(divergence.MIN_BLOCK, divergence.MAX_BLOCK):
            for aligned in (True, False):
                t = _floats(32, D, dtype=dtype, aligned=aligned)
                rows, stats = torch.empty(32), torch.empty(5, 32)
                yield f"{name}", lambda t=t: divergence.softmax_kl_forward(t, t)
                for need in ((True, True), (True, False), (False, True)):
                    yield (
                        f"{name} {'t' * need[0]}{'s' * need[1]}",
                        lambda t=t, need=need: divergence.softmax_kl_backward(rows, t, t, stats, *need),
                    )
        for integer in INTEGERS:
            for aligned in (True, False):
                logits = _floats(32, 2 * cross_entropy.BLOCK_V, dtype=dtype, aligned=aligned)
                labels, rows, stats = torch.empty(32, dtype=integer), torch.empty(32), torch.empty(2, 32)
                label = f"{name} {TYPE_NAMES[integer]}"
                yield label, lambda x=logits, y=labels: cross_entropy.cross_entropy_forward(x, y, -100, False)
                yield label, lambda x=logits, y=labels: cross_entropy.cross_entropy_backward(rows, x, y, stats, -100)
            yield (
                f"{name} {TYPE_NAMES[integer]}",
                lambda y=labels, x=rows.to(dtype): importance.record(torch.empty(2, 64, dtype=torch.float64), y, x, -100),
            )
    yield "fp32", lambda: importance.update(torch.empty(64), torch.empty(2, 64, dtype=torch.float64), 0.995)
    for S in _powers(selection.MIN_BLOCK, selection.MAX_TOKENS):
        for integer in INTEGERS:
            ids = torch.empty(2, S, dtype=integer)
            for mask in (None, torch.bool, torch.int64, torch.int32):
                mask = mask and torch.empty(2, S, dtype=mask)
                label = f"{TYPE_NAMES[integer]} mask {'none' if mask is None else str(mask.dtype).removeprefix('torch.')}"
                yield label, lambda ids=ids, mask=mask: selection.select(torch.empty(64), ids, 16, mask)


@cache
def launches() -> list[Launch]:
    """Every distinct launch, in the order of `calls`."""
    found: dict[Launch, None] = {}
    label = ""

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[Launch.of_call(kernel, label, args, kwargs)] = None

    run, JITFunction.run = JITFunction.run, catch
    try:
        for label, call in calls():  # noqa: B007 - `catch` reads it
            call()
    finally:
        JITFunction.run = run
    return list(found)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of local memory per thread, which is where spills go) of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compile_one(job: tuple[int, int]) -> tuple[str, int]:
    """(line to print, bytes spilled) of the launch with this index, for this architecture."""
    index, architecture = job
    launch = launches()[index]
    kernel = launch.compile(architecture)
    registers, spills = resources(kernel.asm["cubin"])
    blocks = " ".join(f"{k}={v}" for k, v in launch.constants if k.isupper() and not isinstance(v, bool))
    line = (
        f"{launch.name:30} sm_{architecture} {launch.label:18} {blocks:22} warps {launch.num_warps:2}  "
        f"registers {registers:3}  shared {kernel.metadata.shared:5}  spills {spills}"
    )
    return line, spills


def main() -> int:
    jobs = [(i, architecture) for i in range(len(launches())) for architecture in ARCHITECTURES]
    spilled = 0
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for line, spills in pool.map(compile_one, jobs, chunksize=8):
            print(line, flush=True)
            spilled += spills > 0
    print(f"{len(jobs)} cubins from {len({launch.name for launch in launches()})} kernels, triton {triton.__version__}")
    if spilled:
        print(f"{spilled} of them spill registers: use smaller blocks or more warps", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
