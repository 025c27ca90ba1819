"""The device memory of a run, computed: what the engine holds, and what a step of each mode allocates beside it.

The step's part is no formula: the run's own forward and backward are walked through at their real sizes, with tensors that hold
no data, and what they allocate is counted until it is freed. For a GPU it is counted as for layers that are not compiled.

Not counted: what the CUDA context, NCCL and cuBLAS take, the workspaces of attention's kernels, and fragmentation. `SPARE` of
the device's memory is left to them.
"""

from __future__ import annotations

import contextlib
import math
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from deepspeed.runtime.config import DtypeEnum
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sctd_ds import data
from sctd_ds.config import Block, ConfigError, did_you_mean
from sctd_ds.deepspeed_json import zero_stage
from sctd_ds.deepspeed_schema import ADAM_SWITCHES, optimizer_class
from sctd_ds.integrations import apex
from sctd_ds.method.convert import convert, set_mode
from sctd_ds.method.schedule import Mode, modes
from sctd_ds.run import models
from sctd_ds.run.probe import HUGGING_FACE
from sctd_ds.run.settings import RunConfig

aten = torch.ops.aten

SPARE = 0.1
"""Share of a device's memory that is left to what is not counted."""

CARDS = {
    "b200": 180,
    "h200": 141,
    "h100": 80,
    "a100-80gb": 80,
    "a100-40gb": 40,
    "l40s": 48,
    "a10": 24,
    "l4": 24,
    "rtx-5090": 32,
    "rtx-4090": 24,
    "rtx-3090": 24,
    "v100-32gb": 32,
    "v100-16gb": 16,
    "t4": 16,
}
"""Memory of GPUs in GB (10^9 bytes), by their data sheets."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind: a name, how many there are, and the bytes of memory of each."""

    name: str
    devices: int
    memory: float


def parse_machine(text: str) -> Machine:
    """ "h100:8" or "80GB:8": a card in CARDS, or the memory of another, and how many; without a number, one."""
    name, _, count = text.lower().partition(":")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)gb", name)
    if not size and name not in CARDS:
        raise ConfigError(
            f'--for {text}: unknown device "{name}", {did_you_mean(name, CARDS)} Or give its memory, as in 80GB:8'
        )
    if not (count or "1").isdecimal() or int(count or 1) < 1:
        raise ConfigError(f'--for {text}: expected DEVICE:NUMBER, for example h100:8, found "{count}" for the number')
    return Machine(name, int(count or 1), 1e9 * (float(size[1]) if size else CARDS[name]))


@dataclass(frozen=True)
class Needs:
    """Bytes of device memory that a rank of a run needs."""

    micro_batch: int
    """Rows."""
    states: dict[str, int]
    """What is there during every step: parameters, the optimizer's states with its fp32 copy of them, gradients and buckets."""
    step: dict[str, int]
    """By mode, the most that forward and backward of a micro-batch allocate beside the states at a time; also for the modes
    and the untouched model ("huggingface") that are timed at start-up."""
    update: int
    """The same of the optimizer's update."""
    per_row: dict[str, float]
    """What a row more in the micro-batch adds to each of `step`."""

    @property
    def held(self) -> int:
        return sum(self.states.values())

    @property
    def peak(self) -> int:
        return self.held + max(*self.step.values(), self.update)

    def most_rows(self, memory: float) -> int:
        """The largest micro-batch whose peak leaves SPARE of a device's memory."""
        left = (1 - SPARE) * memory - self.held
        if left < self.update:
            return 0
        more = min((left - size) / self.per_row[mode] for mode, size in self.step.items())
        return max(0, self.micro_batch + math.floor(more))

    def lines(self, machine: Machine) -> list[str]:
        """For a person, and whether it fits."""
        share = self.peak / machine.memory
        fits = "it fits" if share <= 1 - SPARE else "it barely fits" if share <= 1 else "it does not fit"
        states = ", ".join(f"{name} {_gib(size)}" for name, size in self.states.items())
        step = ", ".join(f"{mode} {_gib(size)}" for mode, size in self.step.items())
        rows = self.most_rows(machine.memory)
        return [
            f"  memory           {_gib(self.peak)} GiB of the {_gib(machine.memory)} of {machine.name}, computed: {fits}",
            f"    states         {_gib(self.held)} GiB: {states}",
            f"    a micro-batch  of {self.micro_batch} rows, beside the states: {step}",
            f"    an update      {_gib(self.update)} GiB beside the states",
            f"    micro-batches  of up to {rows} rows fit" if rows else "    micro-batches  of no size fit",
            "    not counted    context, communication, workspaces of kernels, fragmentation; "
            f"{SPARE:.0%} of the memory is left to them",
        ]


def _gib(size: float) -> str:
    """Two digits that count, at least."""
    return f"{size / 2**30:.{1 if size >= 2**30 else 2 if size >= 2**27 else 3}f}"


def compute(run: RunConfig, packed: data.PackedData, gpu: bool) -> Needs:
    """What a rank of `run` needs on a GPU, or on a CPU. Raises ConfigError for runs whose memory cannot be computed."""
    block = run.deepspeed.get("zero_optimization") or {}
    if run.pretrain.stages > 1:
        raise ConfigError("memory is not computed for pipelines")
    if isinstance(block, dict) and "offload_optimizer" in block:
        raise ConfigError("memory is not computed with zero_optimization.offload_optimizer")
    rows, length, taken = run.micro_batch, run.pretrain.seq_length, [*modes(run.sctd)]
    with _without_data(gpu) as device:
        model = _build(run, packed, device)
        names: list[Mode | Literal["huggingface"]] = [*taken, HUGGING_FACE] if run.pretrain.probe_steps else [*taken]
        # Twice the rows, as by one row alone a "spread" step does not grow evenly: it aligns every interval-th.
        step, twice = (
            {str(name): allocated(model, name, n, length, run.sctd.interval) for name in names} for n in (rows, 2 * rows)
        )
        states, update = engine_states(run, sum(p.numel() for p in model.parameters()), gpu)
    return Needs(rows, states, step, update, per_row={name: (twice[name] - step[name]) / rows for name in step})


# What the engine holds


def engine_states(run: RunConfig, parameters: int, gpu: bool) -> tuple[dict[str, int], int]:
    """Bytes of the states of a rank's engine, by name, and what an update allocates beside them at a time.

    parameters: of the model, all trainable. As DeepSpeed 0.19 allocates them; tests compare with its engines.
    """
    config = run.deepspeed
    stage, n, ranks = zero_stage(config), parameters, run.world_size
    width = 2 if any((config.get(name) or {}).get("enabled") for name in ("fp16", "bf16")) else 4
    wanted = (config.get("data_types") or {}).get("grad_accum_dtype")
    sums = width if wanted is None else DtypeEnum(wanted).value.itemsize
    moments, temporary = _optimizer_bytes(run.apex_optimizer or config.get("optimizer") or {})
    shared = ranks if stage else 1
    states = {"parameters": width * n}
    sums_apart = stage == 1 and width < sums  # for bf16 DeepSpeed then builds its BF16_Optimizer
    if stage and not gpu and not sums_apart:
        states["parameters"] += width * n  # where the device is the host, the tensors from before ZeRO stay
    if stage == 0 and width == 4:
        return {**states, "optimizer": moments * n, "gradients": 4 * n}, (4 if ranks > 1 else 0) * n
    states["optimizer"] = (4 + moments) * n // shared
    if stage == 2:
        states["gradients"] = sums * n // shared
    elif sums_apart:
        states["gradients"] = (sums + width) * n
    else:
        states["gradients"] = width * n
    block: Block = config["zero_optimization"] if stage and isinstance(config["zero_optimization"], dict) else {}
    if stage and block.get("contiguous_gradients", True):
        buffers = 2 if block.get("overlap_comm") and ranks > 1 else 1
        size = int(block.get("reduce_bucket_size", 5e8))
        states["buckets"] = (size if gpu else min(size, n)) * width * buffers  # a host has no pages for what is never written
    gradients = sums if stage else width
    return states, max(4, 4 + temporary - gradients) * n // shared


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _optimizer_bytes(block: Block) -> tuple[int, int]:
    """Bytes per parameter of an optimizer's states, and of what its update allocates at a time."""
    kind, params = str(block.get("type", "AdamW")), dict(block.get("params", {}))
    if kind in apex.OPTIMIZERS:
        return 8, 0
    built = optimizer_class(kind, params, offloads=False)
    if built is None:
        raise ConfigError(f"memory is not computed for optimizer.type={kind}")
    if not built.__module__.startswith("torch.optim"):  # DeepSpeed's fused ones, which would have to be compiled
        return (4 if kind.lower() == "lion" else 8), 0
    weight = nn.Parameter(torch.ones(64, device="cpu"))
    others = ("lr", "fused", *ADAM_SWITCHES)  # the last are DeepSpeed's, and a fused optimizer may need a GPU
    optimizer = built([weight], lr=1e-3, **{key: value for key, value in params.items() if key not in others})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(x.numel() * x.element_size() for x in optimizer.state[weight].values() if isinstance(x, Tensor) and x.dim())
    return held // 64, 0 if params.get("fused") else 8


# What a step allocates


def allocated(model: nn.Module, mode: Mode | Literal["huggingface"], rows: int, length: int, step: int) -> int:
    """The most bytes that forward and backward of one micro-batch allocate at a time, beside the engine's states.

    model: converted, in its training precision, and of tensors without data, or real ones. mode: "huggingface" is the untouched
    model's forward. Rows are full, so padding needs no mask. step: the optimizer step, which chooses the rows of a
    "spread" step.
    """
    ids = torch.zeros(rows, length, dtype=torch.long, device=next(model.parameters()).device)
    forward = model.forward
    if mode == HUGGING_FACE:
        forward = partial(type(model).forward, model)
    else:
        set_mode(model, mode, step)
    handles = [p.register_post_accumulate_grad_hook(_take_gradient) for p in model.parameters()]
    try:
        with Live([*model.parameters(), *model.buffers(), ids]) as live:
            forward(input_ids=ids, labels=ids).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return live.peak


def _take_gradient(parameter: Tensor) -> None:
    """As the engine does, which keeps gradients in memory of its own."""
    parameter.grad = None


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on: those that are there `now`, and the most at a time, `peak`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or written in place
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _build(run: RunConfig, packed: data.PackedData, device: torch.device) -> nn.Module:
    """The run's converted model in its training precision, with weights that hold no data."""
    dtype = next((_DTYPES[name] for name in ("fp16", "bf16") if (run.deepspeed.get(name) or {}).get("enabled")), torch.float32)
    with device:
        model = transformers.AutoModelForMaskedLM.from_config(models.sizes(run.pretrain, packed.tokenizer), dtype=dtype)
        return convert(model.train(), models.method_of(run, packed))


@contextlib.contextmanager
def _without_data(gpu: bool) -> Iterator[torch.device]:
    """The device of tensors that hold no data, on which operators allocate what they do on a GPU, or on a CPU."""
    if not gpu:
        with FakeTensorMode():
            yield torch.device("cpu")
        return
    # Of these torch chooses other operators on a GPU, which keep something else for the backward pass. (A TorchFunctionMode
    # would not see the layers that run again in the backward pass.)
    usual = F.dropout, F.scaled_dot_product_attention
    F.dropout, F.scaled_dot_product_attention = _dropout, _attention  # type: ignore[assignment]
    try:
        yield torch.device("meta")
    finally:
        F.dropout, F.scaled_dot_product_attention = usual  # type: ignore[assignment]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return aten.native_dropout(x, p, True)[0] if training and p else x


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **others: Any
) -> Tensor:
    """As `adapters.attention` chooses kernels: flash and cuDNN have neither fp32 nor masks.

    others: whether it is causal and its scale, which take no memory.
    """
    if query.dtype != torch.float32 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p)[0]
