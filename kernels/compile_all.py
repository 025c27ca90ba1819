"""Compile every kernel to machine code without a GPU: `python kernels/compile_all.py`.

The tests use triton's interpreter on machines without a GPU. It misses type errors, unsupported instructions
and register spills, which building the cubins finds. This script calls the operators themselves with every
block size of their launch tables and every dtype, aligned and unaligned, and intercepts their launches before
the driver. It compiles each distinct launch for every architecture and prints one line for it. The exit
status is 1 if a kernel spills registers or needs more shared memory than a block may have, or if one that moves
aligned rows does not use accesses of 16 bytes, or does not load ahead although it loops over a row.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
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

ARCHITECTURES = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one block may have."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
WIDE = ("take_rows_kernel", "split_rows_kernel", "softmax_kl_kernel", "softmax_kl_backward_kernel", "cross_entropy_kernel")
PIPELINED = ("cross_entropy_kernel",)
TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, chosen as in triton's launcher."""

    kernel: JITFunction = field(compare=False)
    name: str
    label: str = field(compare=False)
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


def floats(*shape: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    """Uninitialised memory; not aligned: an odd row length, and a start between two 16-byte boundaries."""
    *rows, columns = shape
    if aligned or columns <= 2:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(*rows, columns + 1, dtype=dtype)[..., 1:-1]


def powers(smallest: int, largest: int) -> Iterator[int]:
    while smallest <= largest:
        yield smallest
        smallest *= 2


def launch_all() -> Iterator[str]:
    """Make every possible launch, on tensors with few rows. Yields a label before the launch that it names."""
    kept, slot = torch.empty(2, 16, dtype=torch.int32), torch.empty(2, 32, dtype=torch.int32)
    rows, kl_stats, ce_stats = torch.empty(32), torch.empty(5, 32), torch.empty(2, 32)
    scores, loss_stats = torch.empty(64), torch.empty(2, 64, dtype=torch.float64)
    for dtype, aligned in itertools.product(FLOATS, (True, False)):
        name = TYPE_NAMES[dtype] + ("" if aligned else " unaligned")
        for D in powers(routing.MIN_BLOCK_D, routing.MAX_BLOCK_D):
            x, y = floats(2, 32, D, dtype=dtype, aligned=aligned), floats(2, 16, D, dtype=dtype, aligned=aligned)
            yield f"{name} gather"
            routing.gather(x, kept, slot)
            yield f"{name} merge"
            routing.merge(x, y, kept, slot)
            yield f"{name} merge, dx"
            routing.unmerge(x, kept, slot, True, False)
            yield f"{name} merge, dx dy"
            routing.unmerge(x, kept, slot, True, True)
        for D in powers(divergence.MIN_BLOCK, divergence.MAX_BLOCK):
            x = floats(32, D, dtype=dtype, aligned=aligned)
            yield name
            divergence.softmax_kl_forward(x, x)
            yield f"{name} both"
            divergence.softmax_kl_backward(rows, x, x, kl_stats, True, True)
            yield f"{name} teacher"
            divergence.softmax_kl_backward(rows, x, x, kl_stats, True, False)
            yield f"{name} student"
            divergence.softmax_kl_backward(rows, x, x, kl_stats, False, True)
        if not aligned:
            yield f"{name} one class"
            cross_entropy.cross_entropy_forward(
                torch.empty(32, 1, dtype=dtype), torch.empty(32, dtype=torch.int64), -100, False
            )
        for integer in INTEGERS:
            logits = floats(32, 8 * cross_entropy.BLOCK_V - 64, dtype=dtype, aligned=aligned)
            labels = torch.empty(32, dtype=integer)
            yield f"{name} {TYPE_NAMES[integer]}"
            cross_entropy.cross_entropy_forward(logits, labels, -100, False)
            yield f"{name} {TYPE_NAMES[integer]}"
            cross_entropy.cross_entropy_backward(rows, logits, labels, ce_stats, -100)
            yield f"{name} {TYPE_NAMES[integer]}"
            importance.record(loss_stats, labels, rows.to(dtype), -100)
    yield "fp32"
    importance.update(scores, loss_stats, 0.995)
    masks = (None, torch.bool, torch.uint8, torch.int32, torch.int64)
    for integer, mask, S in itertools.product(INTEGERS, masks, powers(selection.MIN_BLOCK, selection.MAX_TOKENS)):
        yield f"{TYPE_NAMES[integer]} mask {str(mask).removeprefix('torch.')}"
        ids = torch.empty(2, S, dtype=integer)
        selection.select(scores, ids, 16, None if mask is None else torch.empty(2, S, dtype=mask))


@cache
def launches() -> list[Launch]:
    """Every distinct launch, in the order of `launch_all`."""
    found: dict[Launch, None] = {}
    label = ""

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[Launch.of_call(kernel, label, args, kwargs)] = None

    run, JITFunction.run = JITFunction.run, catch
    try:
        for label in launch_all():  # noqa: B007 - `catch` reads it
            pass
    finally:
        JITFunction.run = run
    return list(found)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory, where spills go), both per thread, of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def access_width(ptx: str) -> int:
    """The width in bytes of those accesses to global memory that move the most bytes."""
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
    ]
    moved: Counter[int] = Counter()
    for width in widths + ahead(ptx):
        moved[width] += width
    return moved.most_common(1)[0][0] if moved else 0


def ahead(ptx: str) -> list[int]:
    """The widths in bytes of the loads that a kernel starts before it needs them."""
    return [int(width, 0) for width in re.findall(r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)]


def compile_one(job: tuple[int, int]) -> tuple[str, str]:
    """(line to print, problem or "") of the launch with this index, for this architecture."""
    index, architecture = job
    launch = launches()[index]
    kernel = launch.compile(architecture)
    registers, spills = resources(kernel.asm["cubin"])
    access = access_width(kernel.asm["ptx"])
    blocks = " ".join(f"{k}={v}" for k, v in launch.constants if k.isupper() and not isinstance(v, bool))
    line = (
        f"{launch.name:29} sm_{architecture} {launch.label:27} {blocks:20} warps {launch.num_warps:2}  "
        f"registers {registers:3}  shared {kernel.metadata.shared:5}  access {access:2}  spills {spills}"
    )
    aligned = "unaligned" not in launch.label
    if spills:
        return line, "spills registers: use smaller blocks or more warps"
    if kernel.metadata.shared > ARCHITECTURES[architecture]:
        return line, "needs more shared memory than a block may have: use smaller blocks or fewer stages"
    if access < 16 and launch.name in WIDE and aligned:
        return line, "moves aligned rows in narrow accesses: check its masks and pointers"
    if launch.name in PIPELINED and aligned and not ahead(kernel.asm["ptx"]):
        return line, "does not load ahead: check the stages of its loop"
    return line, ""


def main() -> int:
    jobs = [(i, architecture) for i in range(len(launches())) for architecture in ARCHITECTURES]
    wrong = 0
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for line, problem in pool.map(compile_one, jobs, chunksize=8):
            print(line, flush=True)
            if problem:
                print(f"  ^ {problem}", file=sys.stderr)
                wrong += 1
    names = {launch.name for launch in launches()}
    print(f"{len(jobs)} cubins of {len(names)} kernels, {wrong} of them wrong, triton {triton.__version__}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
