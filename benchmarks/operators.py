"""The library operators on which a step rests: attention by backend, and matrix products by shape.

    python -m benchmarks.operators [--model large --length 512 --batch 64]

Attention has the four shapes of a layer's queries and keys: S all tokens, K the kept ones, R those that the last layer reads.
Every backend of torch's scaled_dot_product_attention is forced in turn, and "torch" chooses by itself; `rule` is the order in
which this project's adapters try them. `dropped` is the share of attention weights that dropout really removes, and `scale`
what it multiplies the others by. `error` is the relative error of the output and of all gradients against float32, without
dropout. Results go to <out>/<device>/attention.csv and matrix_products.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from benchmarks.harness import DEVICE, MEASURED, failure, has_failed
from benchmarks.steps import DTYPES, MODELS, Case
from sctd_ds.adapters.attention import backends
from sctd_ds.method.plan import kept_tokens

BACKENDS = {
    "torch": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NO_KERNEL = "no kernel for this"
DROPOUT = 0.1


@dataclass(frozen=True)
class Attention:
    """One call: queries [B, heads, Q, D] on keys and values [B, heads, C, D]."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_size: int
    dropout: float = 0.0
    masked: bool = False
    deterministic: bool = False

    @property
    def flops(self) -> int:
        """Necessary operations, forward."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_size

    @property
    def how(self) -> str:
        parts = {f"dropout {self.dropout:g}": self.dropout, "masked": self.masked, "deterministic": self.deterministic}
        return ", ".join(name for name, on in parts.items() if on) or "plain"

    def rule(self, dtype: torch.dtype) -> str:
        """The backends that this project's adapters try, in order."""
        names = backends(
            batch=self.batch,
            heads=self.heads,
            queries=self.queries,
            keys=self.keys,
            head_size=self.head_size,
            dtype=dtype,
            masked=self.masked,
            dropout=self.dropout,
            deterministic=self.deterministic,
            device=DEVICE,
        )
        return " ".join(names) or "torch"

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Random query, key and value in the memory layout that a layer's projections give them."""

        def random(tokens: int) -> Tensor:
            x = torch.randn(self.batch, tokens, self.heads * self.head_size, device=DEVICE).to(dtype).requires_grad_()
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        return [random(tokens).detach().requires_grad_() for tokens in (self.queries, self.keys, self.keys)]

    def mask(self) -> Tensor | None:
        """Every second row ends in a quarter of padding; None where rows are full."""
        if not self.masked:
            return None
        real = torch.ones(self.batch, 1, 1, self.keys, dtype=torch.bool, device=DEVICE)
        real[1::2, ..., self.keys - self.keys // 4 :] = False
        return real


def attentions(case: Case) -> list[Attention]:
    """The shapes of a case's layers, each plain, with dropout, deterministic and masked."""
    size = MODELS[case.model]
    heads = size["num_attention_heads"]
    kept = kept_tokens(case.length, 0.5)
    read = case.labels + 1
    found = []
    for name, queries, keys in (
        ("S,S", case.length, case.length),
        ("K,S", kept, case.length),
        ("K,K", kept, kept),
        ("R,S", read, case.length),
    ):
        plain = Attention(name, case.batch, heads, queries, keys, size["hidden_size"] // heads)
        found += [
            plain,
            replace(plain, dropout=DROPOUT),
            replace(plain, dropout=DROPOUT, deterministic=True),
            replace(plain, masked=True),
            replace(plain, dropout=DROPOUT, masked=True),
        ]
    return found


@contextmanager
def kernels(attention: Attention, backend: str) -> Iterator[None]:
    """The chosen backend, and deterministic algorithms where `attention` wants them."""
    torch.use_deterministic_algorithms(attention.deterministic)
    try:
        with nullcontext() if BACKENDS[backend] is None else sdpa_kernel(BACKENDS[backend]):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def attend(attention: Attention, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, T, D] -> [B, T, heads * D], as a layer needs it."""
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=attention.dropout)
    return mixed.transpose(1, 2).flatten(2)


def error_of(attention: Attention, dtype: torch.dtype) -> float:
    """The largest relative error of output and gradients; infinite if one is not finite. The backend is chosen outside."""
    inputs, mask = attention.inputs(dtype), attention.mask()
    output = attend(attention, mask, *inputs)
    upstream = torch.randn_like(output)
    results = [output, *torch.autograd.grad(output, inputs, upstream)]
    if attention.dropout:
        return 0.0 if all(x.isfinite().all() for x in results) else math.inf
    wide = [x.detach()[:2].float().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        truth = attend(attention, None if mask is None else mask[:2], *wide)
    truths = [truth, *torch.autograd.grad(truth, wide, upstream[:2].float())]
    errors = [((x[:2].float() - t).norm() / t.norm()).nan_to_num(math.inf).item() for x, t in zip(results, truths, strict=True)]
    return max(errors)


def dropout_of(attention: Attention, dtype: torch.dtype) -> tuple[float, float]:
    """(the share of weights that dropout removes, the factor of the others). The backend is chosen outside.

    The first n keys get the same weight 1/n and the others none; value j is the j-th unit vector. So output j is weight j.
    """
    n = min(attention.head_size, attention.keys // 2)
    query, key, value = (torch.zeros_like(x) for x in attention.inputs(dtype))
    query[..., 0], key[..., n:, 0] = 16.0, -2.5 * math.sqrt(attention.head_size)  # a logit of -40
    value[..., :n, :n] = torch.eye(n, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        weights = attend(attention, attention.mask(), query, key, value).unflatten(-1, (attention.heads, -1))[..., :n]
    kept = (weights != 0).sum().item()
    return 1 - kept / weights.numel(), weights.double().sum().item() * n / max(kept, 1)


def gradient_calls(function: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]]) -> tuple[list, list]:
    """(forward calls, forward and backward calls), one per set of inputs."""
    upstream = torch.randn_like(function(*sets[0]))

    def both(inputs: Sequence[Tensor]) -> None:
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return [partial(function, *inputs) for inputs in sets], [partial(both, inputs) for inputs in sets]


def times(function: Callable[..., Tensor], inputs: Callable[[], Sequence[Tensor]], flops: int) -> dict[str, float]:
    """The measured columns of a row. flops: necessary operations of a forward pass; a backward pass has twice as many."""
    stream = harness.new_stream()
    harness.synchronize()
    with torch.cuda.stream(stream):
        first = inputs()
        sets = [first, *(inputs() for _ in range(harness.input_sets(sum(x.nbytes for x in first)) - 1))]
        forward, both = gradient_calls(function, sets)
    forward_us, both_us = (harness.time_calls(calls, stream).median for calls in (forward, both))
    return {
        "forward_us": round(forward_us, 1),
        "both_us": round(both_us, 1),
        "forward_tflops": round(flops / forward_us / 1e6, 4),
        "both_tflops": round(3 * flops / both_us / 1e6, 4),
    }


def attention_row(attention: Attention, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """One backend on one call, measured."""
    row: dict[str, Any] = {
        "shape": attention.name,
        "queries": attention.queries,
        "keys": attention.keys,
        "how": attention.how,
        "rule": "",
        "backend": backend,
        **dict.fromkeys(("forward_us", "both_us", "forward_tflops", "both_tflops", "error", "dropped", "scale"), ""),
    }
    try:
        row["rule"] = attention.rule(dtype)
        with kernels(attention, backend):
            row["error"] = error_of(attention, dtype)
            if attention.dropout:
                row["dropped"], row["scale"] = (round(x, 4) for x in dropout_of(attention, dtype))
            mask = attention.mask()
            row |= times(partial(attend, attention, mask), lambda: attention.inputs(dtype), attention.flops)
        row["status"] = MEASURED
    except Exception as error:  # whatever it is, the other figures are worth having
        absent = re.search("no available kernel|no viable backend", str(error), re.IGNORECASE)
        row["status"] = NO_KERNEL if absent else failure(error)
    return row


def product_rows(case: Case, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The encoder's matrix products, measured: three numbers of rows by the shapes of its weights, and Q, K and V as one."""
    size = MODELS[case.model]
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    weights = {
        "projection": (hidden, hidden),
        "Q, K, V in one": (hidden, 3 * hidden),
        "feed-forward in": (hidden, inner),
        "feed-forward out": (inner, hidden),
    }
    tokens = {"S": case.length, "K": kept_tokens(case.length, 0.5), "R": case.labels + 1}
    for (name, (into, out)), (which, count) in ((w, t) for w in weights.items() for t in tokens.items()):
        rows = case.batch * count
        row = {"product": name, "tokens": which, "rows": rows, "in": into, "out": out}

        def inputs(shapes: Sequence[tuple[int, ...]] = ((rows, into), (out, into), (out,))) -> list[Tensor]:
            return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]

        try:
            row |= times(F.linear, inputs, 2 * rows * into * out) | {"status": MEASURED}
        except Exception as error:  # whatever it is, the other figures are worth having
            row |= dict.fromkeys(("forward_us", "both_us", "forward_tflops", "both_tflops"), "") | {"status": failure(error)}
        yield row


def attention_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """All backends on one call: microseconds forward / forward and backward, with what is unusual about them."""
    cells = []
    for row in rows:
        text = row["status"] if row["both_us"] == "" else f"{row['forward_us']:.0f}/{row['both_us']:.0f}"
        if row["dropped"] != "":
            text += f" drops {row['dropped']:.3f} x{row['scale']:.3f}"
        if row["error"] != "" and row["error"] > 0:
            text += f" err {row['error']:.0e}"
        cells.append(f"{row['backend']} {text}")
    return f"{rows[0]['shape']} {rows[0]['how']:26} " + " | ".join([*cells, f"rule: {rows[0]['rule']}"])


def main(arguments: Sequence[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.operators", description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", choices=MODELS, default="large", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    case, dtype = Case(options.model, options.length, options.batch), DTYPES[options.dtype]
    if DEVICE.type == "cpu" and options.model != "toy":
        parser.error("this needs a GPU; --model toy shows on a CPU that it runs")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms require it of cuBLAS
    torch.utils.deterministic.fill_uninitialized_memory = False  # a guard that training does without, too
    environment = harness.Environment.collect()
    folder = options.out / environment.folder_name
    print(f"{environment.device}, torch {environment.torch}, {case}, {options.dtype}: microseconds forward / and backward")
    found: list[dict[str, Any]] = []
    for attention in attentions(case):
        rows = [attention_row(attention, backend, dtype) for backend in BACKENDS]
        print(attention_line(rows), flush=True)
        found += rows
        harness.write_csv(folder / "attention.csv", found, environment)
    products = list(product_rows(case, dtype))
    harness.write_csv(folder / "matrix_products.csv", products, environment)
    print("matrix products: microseconds forward / and backward, TFLOP/s of each")
    for row in products:
        name = f"{row['product']:16} {row['tokens']} {row['rows']:6} x {row['in']} x {row['out']}"
        figures = f"{row['forward_us']}/{row['both_us']} us, {row['forward_tflops']}/{row['both_tflops']} TFLOP/s"
        print(f"{name:42} {figures if row['status'] == MEASURED else row['status']}")
    print(f"written: {folder / 'attention.csv'}, {folder / 'matrix_products.csv'}")
    return 1 if any(has_failed(row["status"]) for row in [*found, *products]) else 0


if __name__ == "__main__":
    sys.exit(main())
