"""gather_tokens and merge_tokens are copies, so outputs and gradients equal the references' bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sctd_kernels import gather_tokens, merge_tokens, reference

from helpers.kernels import DEVICE, FLOATS, LAYOUTS, gpu, random, random_routing, random_shapes

SHAPES = [(1, 1, 1, 1), (3, 11, 4, 100), (2, 37, 37, 16), (1, 5, 1, 1000), (2, 9, 5, 1024), (1, 6, 3, 1280), (0, 4, 2, 8)]


def results(backend, x, y, routing, dy, dz):
    """Outputs and every gradient, of each function alone and of both together."""
    gathered = gather_tokens(x, *routing, backend=backend)
    merged = merge_tokens(x, y, *routing, backend=backend)
    both = merge_tokens(x, gathered + y, *routing, backend=backend)
    yield "gather", gathered
    yield "merge", merged
    yield "gather, dx", torch.autograd.grad(gathered, x, dy, retain_graph=True)[0]
    yield "merge, only dx", torch.autograd.grad(merged, x, dz, retain_graph=True)[0]
    yield "merge, only dy", torch.autograd.grad(merged, y, dz, retain_graph=True)[0]
    for name, gradient in zip(("dx", "dy"), torch.autograd.grad(merged, (x, y), dz), strict=True):
        yield f"merge, {name}", gradient
    for name, gradient in zip(("dx", "dy"), torch.autograd.grad(both, (x, y), dz), strict=True):
        yield f"gather and merge, {name}", gradient


def check(B, S, K, D, dtype, layout=LAYOUTS["dense"]):
    routing = random_routing(B, S, K)
    x, y, dy, dz = (layout(random(B, n, D, dtype=dtype)) for n in (S, K, K, S))
    x.requires_grad_(), y.requires_grad_()
    expected = results("torch", x, y, routing, dy, dz)
    for (name, kernel), (_, copied) in zip(results("triton", x, y, routing, dy, dz), expected, strict=True):
        assert kernel.dtype == dtype and torch.equal(kernel, copied), name


def test_example():
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], device=DEVICE)
    y = torch.tensor([[[10.0], [30.0]]], device=DEVICE)
    kept = torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE)
    slot = torch.tensor([[0, -1, 1, -1]], dtype=torch.int32, device=DEVICE)
    assert gather_tokens(x, kept, slot, backend="triton").flatten().tolist() == [1, 3]
    assert merge_tokens(x, y, kept, slot, backend="triton").flatten().tolist() == [10, 2, 30, 4]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-S{0[1]}-K{0[2]}-D{0[3]}".format)
def test_kernel_is_exact(shape, dtype):
    check(*shape, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [128, 100])
def test_any_layout(layout, D):
    check(2, 9, 4, D, torch.bfloat16, LAYOUTS[layout])


@random_shapes
@given(B=st.integers(1, 3), S=st.integers(1, 20), D=st.integers(1, 300), data=st.data())
def test_any_shape(B, S, D, data):
    check(B, S, data.draw(st.integers(1, S)), D, data.draw(st.sampled_from(FLOATS)))


def test_expanded_gradients():
    """The gradient of a sum is one number expanded, with strides of zero."""
    routing = random_routing(2, 9, 4)
    x, y = random(2, 9, 128, grad=True), random(2, 4, 128, grad=True)
    gather_tokens(x, *routing, backend="triton").sum().backward()
    merge_tokens(x, y, *routing, backend="triton").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(y.grad, torch.ones_like(y))


def test_values_pass_untouched():
    """NaN, infinities and signed zeros are data like any other."""
    routing = random_routing(1, 4, 2)
    x = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40], device=DEVICE)[None, :, None].expand(1, 4, 128).contiguous()
    same = merge_tokens(x, gather_tokens(x, *routing, backend="triton"), *routing, backend="triton")
    assert torch.equal(same.view(torch.int32), x.view(torch.int32))


def test_kernel_gradients_are_differentiable():
    """Each operator is the adjoint of another one, so derivatives of any order are there: <u, G v> is linear in both."""
    routing = random_routing(2, 5, 3)
    x, dy = random(2, 5, 128, grad=True), random(2, 3, 128, grad=True)
    (dx,) = torch.autograd.grad(gather_tokens(x, *routing, backend="triton"), x, dy, create_graph=True)
    u = random(2, 5, 128)
    (again,) = torch.autograd.grad(dx, dy, u)
    assert torch.equal(again, reference.gather_tokens(u, *routing))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 2, 3), (1, 4, 4, 2)], ids=str)
def test_references_are_right(shape):
    """Values by Python loops, gradients by finite differences."""
    B, S, K, D = shape
    kept, slot = random_routing(B, S, K)
    x = torch.randn(B, S, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.randn(B, K, D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    gathered, merged = reference.gather_tokens(x, kept, slot), reference.merge_tokens(x, y, kept, slot)
    for b in range(B):
        for k in range(K):
            assert torch.equal(gathered[b, k], x[b, kept[b, k]])
        for s in range(S):
            assert torch.equal(merged[b, s], x[b, s] if slot[b, s] < 0 else y[b, slot[b, s]])
    assert torch.autograd.gradcheck(lambda x: reference.gather_tokens(x, kept, slot), x)
    assert torch.autograd.gradcheck(lambda x, y: reference.merge_tokens(x, y, kept, slot), (x, y))


@gpu
def test_offsets_beyond_32_bits():
    """A tensor of more than 2**31 elements: the last rows must arrive."""
    x = torch.zeros(3, 2**20, 1024, dtype=torch.float16, device=DEVICE)
    x[2, -1] = 7
    kept = torch.tensor([[0], [0], [2**20 - 1]], dtype=torch.int32, device=DEVICE)
    slot = torch.full((3, 2**20), -1, dtype=torch.int32, device=DEVICE)
    slot[0, 0] = slot[1, 0] = slot[2, -1] = 0
    gathered = gather_tokens(x, kept, slot)
    assert gathered[2].eq(7).all() and gathered[:2].eq(0).all()
    assert merge_tokens(x, gathered * 2, kept, slot)[2, -1].eq(14).all()
