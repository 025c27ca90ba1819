"""The public functions as other code meets them: errors, backends, torch.compile, checkpointing, CUDA graphs, no host sync."""

import doctest
import os
import subprocess
import sys

import pytest
import torch
from sctd_kernels import (
    __all__,
    api,
    backward,
    cross_entropy,
    divergence,
    gather_tokens,
    importance,
    layer_norm,
    linear_gelu,
    merge_tokens,
    record_losses,
    routing,
    select_tokens,
    selection,
    softmax_kl,
    token_cross_entropy,
    update_scores,
)
from torch.utils.checkpoint import checkpoint

from helpers.kernels import DEVICE, gpu, random, random_routing

# The interpreter computes lanes beyond the end of a row and then drops them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")

B, S, K, D, V = 2, 6, 3, 8, 11


def valid_arguments():
    """Of each function, arguments that it takes."""
    kept, slot = random_routing(B, S, K)
    ids = torch.randint(V, (B, S), device=DEVICE)
    labels = torch.randint(V, (B,), device=DEVICE)
    stats = torch.zeros(2, V, dtype=torch.float64, device=DEVICE)
    return {
        "select_tokens": {"scores": random(V), "input_ids": ids, "keep": K, "attention_mask": torch.ones_like(ids)},
        "gather_tokens": {"x": random(B, S, D), "kept": kept, "slot": slot},
        "merge_tokens": {"x": random(B, S, D), "y": random(B, K, D), "kept": kept, "slot": slot},
        "softmax_kl": {"teacher": random(B, D), "student": random(B, D)},
        "token_cross_entropy": {"logits": random(B, V), "labels": labels},
        "linear_gelu": {"x": random(B, S, D), "weight": random(V, D), "bias": random(V)},
        "layer_norm": {"x": random(B, S, D), "weight": random(D), "bias": random(D), "eps": 1e-12},
        "record_losses": {"stats": stats, "labels": labels, "losses": random(B)},
        "update_scores": {"scores": random(V), "stats": stats, "decay": 0.9},
    }


def half(x):
    return x.half()


def double(x):
    return x.double()


def flat(x):
    return x.flatten()


def one_more(x):
    return torch.cat([x, x[:1]])


def elsewhere(x):
    return x.to("meta")


BAD_ARGUMENTS = [
    ("select_tokens", "scores", half, "scores must be float32, got float16: cast it"),
    ("select_tokens", "scores", lambda x: x[None], r"scores must be \[V\], got \[1, 11\]"),
    ("select_tokens", "input_ids", torch.Tensor.short, "input_ids must be int64 or int32, got int16"),
    ("select_tokens", "input_ids", flat, r"input_ids must be \[B, S\], got \[12\]"),
    ("select_tokens", "scores", elsewhere, "scores is on meta but input_ids is on"),
    ("select_tokens", "keep", lambda _: 0, "keep must be between 1 and S = 6, got 0"),
    ("select_tokens", "keep", lambda _: S + 1, "keep must be between 1 and S = 6, got 7"),
    ("select_tokens", "attention_mask", one_more, r"attention_mask must be \[2, 6\] like input_ids, got \[3, 6\]"),
    (
        "select_tokens",
        "attention_mask",
        torch.Tensor.float,
        "attention_mask must be bool or uint8 or int32 or int64, got float32",
    ),
    ("gather_tokens", "x", flat, r"x must be \[B, S, D\], got \[96\]"),
    ("gather_tokens", "x", torch.Tensor.int, "x (is torch.int32|must be floating point)"),
    ("gather_tokens", "kept", torch.Tensor.long, "kept must be int32, got int64: cast it"),
    ("gather_tokens", "slot", torch.Tensor.long, "slot must be int32, got int64: cast it"),
    ("gather_tokens", "kept", one_more, r"kept must be \[2, K\] with 1 <= K <= 6"),
    ("gather_tokens", "kept", lambda x: x.repeat(1, 3), r"kept must be \[2, K\] with 1 <= K <= 6 to match x, got \[2, 9\]"),
    ("gather_tokens", "slot", one_more, r"slot must be \[2, 6\] like the first two dimensions of x, got \[3, 6\]"),
    ("gather_tokens", "kept", elsewhere, "kept is on meta but x is on"),
    ("merge_tokens", "y", half, "y must be float32, got float16"),
    ("merge_tokens", "y", one_more, r"y must be \[2, 3, 8\] to match kept and x, got \[3, 3, 8\]"),
    ("merge_tokens", "y", elsewhere, "y is on meta but x is on"),
    ("softmax_kl", "teacher", flat, r"teacher must be \[N, D\], got \[16\]"),
    ("softmax_kl", "student", half, "student must be float32, got float16"),
    ("softmax_kl", "student", one_more, r"student must be \[2, 8\] like teacher, got \[3, 8\]"),
    ("softmax_kl", "student", elsewhere, "student is on meta but teacher is on"),
    ("token_cross_entropy", "logits", flat, r"logits must be \[N, V\], got \[22\]"),
    ("token_cross_entropy", "labels", one_more, r"labels must be \[2\] one per row of logits, got \[3\]"),
    ("token_cross_entropy", "labels", torch.Tensor.float, "labels must be int64 or int32, got float32"),
    ("token_cross_entropy", "labels", elsewhere, "labels is on meta but logits is on"),
    ("linear_gelu", "x", torch.Tensor.int, "x (is torch.int32|must be floating point)"),
    ("linear_gelu", "x", lambda x: x[..., 1:], r"x must be \[..., 8\] to match weight, got \[2, 6, 7\]"),
    ("linear_gelu", "weight", flat, r"weight must be \[N, D\], got \[88\]"),
    ("linear_gelu", "bias", one_more, r"bias must be \[11\] one per row of weight, got \[12\]"),
    ("linear_gelu", "bias", elsewhere, "bias is on meta but x is on"),
    ("layer_norm", "x", flat, r"x must be \[..., D\], got \[96\]"),
    ("layer_norm", "x", torch.Tensor.int, "x (is torch.int32|must be floating point)"),
    ("layer_norm", "weight", one_more, r"weight must be \[8\] like the last dimension of x, got \[9\]"),
    ("layer_norm", "bias", one_more, r"bias must be \[8\] like the last dimension of x, got \[9\]"),
    ("layer_norm", "weight", elsewhere, "weight is on meta but x is on"),
    ("record_losses", "stats", torch.Tensor.float, "stats must be float64, got float32"),
    ("record_losses", "stats", flat, r"stats must be \[2, V\], got \[22\]"),
    ("record_losses", "stats", lambda x: x.T.contiguous().T, "stats must be contiguous"),
    ("record_losses", "losses", one_more, r"losses must be \[2\] like labels, got \[3\]"),
    ("record_losses", "losses", torch.Tensor.int, "losses (is torch.int32|must be floating point)"),
    ("update_scores", "scores", double, "scores must be float32, got float64"),
    ("update_scores", "scores", one_more, r"stats must be \[2, 12\], got \[2, 11\]"),
    ("update_scores", "scores", lambda x: torch.cat([x, x])[::2], "scores must be contiguous"),
    ("update_scores", "decay", lambda _: 1.5, "decay must be between 0 and 1, got 1.5"),
]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("function, argument, change, message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(function, argument, change, message, backend):
    arguments = valid_arguments()[function]
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message) as caught:
        getattr(api, function)(**arguments, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [name for name in __all__ if name != "reference"])
def test_backends(function):
    call = getattr(api, function)
    call(**valid_arguments()[function])
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton' or 'torch', got 'cuda'"):
        call(**valid_arguments()[function], backend="cuda")


def test_float64_is_for_the_torch_backend():
    kept, slot = random_routing(B, S, K)
    x = random(B, S, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="use backend='torch'"):
        gather_tokens(x, kept, slot, backend="triton")
    assert gather_tokens(x, kept, slot, backend="torch").dtype == torch.float64


def test_too_long_a_row_for_the_kernel():
    ids = torch.zeros(1, selection.MAX_TOKENS + 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="takes up to 8192: use backend='torch'"):
        select_tokens(random(V), ids, 2, backend="triton")
    assert select_tokens(random(V), ids, 2, backend="torch")[0].tolist() == [[0, 1]]


def test_too_wide_a_row_for_the_kernel():
    x = random(1, backward.MAX_BLOCK_D + 1)
    with pytest.raises(ValueError, match="takes up to 4096: use backend='torch'"):
        layer_norm(x, x[0], x[0], 1e-12, backend="triton")
    assert layer_norm(x, x[0], x[0], 1e-12, backend="torch").shape == x.shape


def test_examples_of_the_documentation():
    assert doctest.testmod(api).attempted > 10
    assert doctest.testmod(api).failed == 0


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_works_without_triton():
    """Where triton cannot be imported the torch backend serves, and asking for the other one says what is missing."""
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None
import torch, sctd_kernels
print(sctd_kernels.softmax_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist())
try:
    sctd_kernels.softmax_kl(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")
except ValueError as error:
    print(error)
"""
    assert run_python(code).splitlines() == [
        "[0.0, 0.0]",
        "backend='triton' needs the triton package: install it, or use backend='torch'",
    ]


def test_triton_wants_a_gpu_or_the_interpreter():
    code = """
import torch, sctd_kernels
try:
    sctd_kernels.softmax_kl(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")
except ValueError as error:
    print(error)
"""
    assert run_python(code, TRITON_INTERPRET="0").startswith("backend='triton' needs CUDA tensors, got cpu")


OPERATORS = [
    "select",
    "gather",
    "scatter",
    "merge",
    "unmerge",
    "unmerge, x",
    "unmerge, y",
    "kl",
    "kl backward",
    "ce",
    "ce backward",
    "ce backward_",
    "gelu",
    "gelu backward",
    "norm",
    "norm backward",
    "record",
    "update",
]


def operators():
    """Every registered operator, with arguments."""
    routed = random_routing(B, S, K)
    x, y = random(B, S, D, grad=True), random(B, K, D, grad=True)
    rows, labels = random(B), torch.tensor([3, -100], device=DEVICE)
    t, s, logits = random(B, D, grad=True), random(B, D, grad=True), random(B, V, grad=True)
    stats = torch.zeros(2, V, dtype=torch.float64, device=DEVICE)
    kl_stats = divergence.softmax_kl_forward(t.detach(), s.detach())[1]
    ce_stats = cross_entropy.cross_entropy_forward(logits.detach(), labels.abs() % V, -100, False)[1]
    ids = torch.randint(V, (B, S), device=DEVICE)
    return {
        "select": (selection.select_op, (random(V), ids, K, ids > 3)),
        "gather": (routing.gather_op, (x, *routed)),
        "scatter": (routing.scatter_op, (y, *routed)),
        "merge": (routing.merge_op, (x, y, *routed)),
        "unmerge": (routing.unmerge_op, (x.detach(), *routed, True, True)),
        "unmerge, x": (routing.unmerge_op, (x.detach(), *routed, True, False)),
        "unmerge, y": (routing.unmerge_op, (x.detach(), *routed, False, True)),
        "kl": (divergence.softmax_kl_forward_op, (t, s)),
        "kl backward": (divergence.softmax_kl_backward_op, (rows, t.detach(), s.detach(), kl_stats, True, True)),
        "ce": (cross_entropy.cross_entropy_forward_op, (logits, labels.abs() % V, -100, False)),
        "ce backward": (cross_entropy.cross_entropy_backward_op, (rows, logits.detach(), labels, ce_stats, -100)),
        "ce backward_": (cross_entropy.cross_entropy_backward_op_, (rows, logits.detach(), labels, ce_stats, -100)),
        "gelu": (backward.gelu_forward_op, (s, random(D, grad=True))),
        "gelu backward": (backward.gelu_backward_op, (t.detach(), s.detach())),
        "norm": (backward.layer_norm_forward_op, (s, random(D, grad=True), random(D, grad=True), 1e-12)),
        "norm backward": (backward.layer_norm_backward_op, (t.detach(), s.detach(), random(D), 1e-12)),
        "record": (importance.record_losses, (stats, labels, rows, -100)),
        "update": (importance.update_scores, (random(V), stats + 1, 0.9)),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name):
    """Schema, fake implementation and autograd formula agree with what the operator does, for torch's own checker."""
    assert sorted(operators()) == sorted(OPERATORS)
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


def all_of_them(x, teacher, logits, scores, stats, ids, labels):
    """A step in miniature through every function."""
    kept, slot = select_tokens(scores, ids, K, backend="triton")
    y = torch.tanh(gather_tokens(x, kept, slot, backend="triton"))
    z = merge_tokens(x * 2, y, kept, slot, backend="triton")
    kl = softmax_kl(teacher, z[:, 0], backend="triton")
    normed = layer_norm(z, teacher[0], teacher[1], 1e-5, backend="triton")
    mixed = linear_gelu(normed, teacher, logits[0, :B], backend="triton")
    losses = token_cross_entropy(logits * 1, labels, overwrite_logits=True, backend="triton")
    record_losses(stats, labels, losses, backend="triton")
    update_scores(scores, stats, 0.9, backend="triton")
    return (z.square().sum() + kl.sum() + mixed.sum() + losses.sum()).view(1)


def step(function):
    """Loss, gradients and changed state of one call."""
    torch.manual_seed(1)
    x, teacher, logits = random(B, S, D, grad=True), random(B, D, grad=True), random(B, V, grad=True)
    scores, stats = random(V), torch.zeros(2, V, dtype=torch.float64, device=DEVICE)
    loss = function(
        x,
        teacher,
        logits,
        scores,
        stats,
        torch.arange(B * S, device=DEVICE).view(B, S) % V,
        torch.tensor([3, -100], device=DEVICE),
    )
    loss.backward()
    return loss.detach(), x.grad, teacher.grad, logits.grad, scores, stats


def assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
def test_compiles_without_a_graph_break(dynamic):
    compiled = torch.compile(
        all_of_them, fullgraph=True, dynamic=dynamic, backend="inductor" if DEVICE == "cuda" else "aot_eager"
    )
    assert_same(step(compiled), step(all_of_them))


def test_compiled_code_does_not_overwrite_logits(monkeypatch):
    """The compiler would copy the logits first, to keep its graph free of mutation: the copy that overwriting is to save."""

    def refuse(*arguments):
        raise AssertionError("the overwriting operator was called")

    monkeypatch.setattr(cross_entropy, "cross_entropy_backward_op_", refuse)
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    step(compiled)
    with pytest.raises(AssertionError, match="was called"):
        step(all_of_them)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    def function(x, teacher, logits, scores, stats, ids, labels):
        kept, slot = select_tokens(scores, ids, K, backend="triton")

        def block(x, teacher, logits):
            y = torch.tanh(gather_tokens(x, kept, slot, backend="triton"))
            z = merge_tokens(x * 2, y, kept, slot, backend="triton")
            kl = softmax_kl(teacher, z[:, 0], backend="triton")
            normed = layer_norm(z, teacher[0], teacher[1], 1e-5, backend="triton")
            mixed = linear_gelu(normed, teacher, logits[0, :B], backend="triton")
            losses = token_cross_entropy(logits * 1, labels, overwrite_logits=True, backend="triton")
            return z.square().sum() + kl.sum() + mixed.sum() + losses.sum()

        return checkpoint(block, x, teacher, logits, use_reentrant=use_reentrant).view(1)

    assert_same(step(function)[:4], step(all_of_them)[:4])


@gpu
def test_the_host_never_waits():
    step(all_of_them)  # compiles the kernels
    inputs = (random(B, S, D, grad=True), random(B, D, grad=True), random(B, V, grad=True), random(V))
    stats, ids = torch.zeros(2, V, dtype=torch.float64, device=DEVICE), torch.ones(B, S, dtype=torch.int64, device=DEVICE)
    labels = torch.ones(B, dtype=torch.int64, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_them(*inputs, stats, ids, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_references_never_make_the_host_wait():
    calls = valid_arguments()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function, arguments in calls.items():
            getattr(api, function)(**arguments, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_in_a_cuda_graph():
    """Captured once, replayed on new values."""
    torch.manual_seed(1)
    x, teacher, logits = random(B, S, D, grad=True), random(B, D, grad=True), random(B, V, grad=True)
    scores, stats = random(V), torch.zeros(2, V, dtype=torch.float64, device=DEVICE)
    ids, labels = torch.arange(B * S, device=DEVICE).view(B, S) % V, torch.tensor([3, -100], device=DEVICE)

    def run():
        return torch.autograd.grad(all_of_them(x, teacher, logits, scores, stats, ids, labels), (x, teacher, logits))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in (x, teacher, logits, scores):
            tensor.copy_(random(*tensor.shape))
        stats.zero_()
    state = scores.clone(), stats.clone()
    graph.replay()
    replayed = [t.clone() for t in (*captured, scores, stats)]
    scores.copy_(state[0]), stats.copy_(state[1])
    assert_same(replayed, [*run(), scores, stats])
