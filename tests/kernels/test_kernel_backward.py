"""linear_gelu and layer_norm: values and all gradients against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sctd_kernels import backward, layer_norm, linear_gelu, reference

from helpers.kernels import DEVICE, FLOATS, LAYOUTS, assert_as_good_as_torch, random, random_shapes

ROWS, COLUMNS = backward.GELU_ROWS, backward.GELU_BLOCK_N
NORM_ROWS = backward.NORM_ROWS


def compare(call, names, arguments, *rest):
    """The kernel's results and gradients with the reference's, and with the reference's in float64."""
    results, grad = [], random(*call(*arguments, *rest).shape, dtype=arguments[0].dtype)
    for backend, widen in (("triton", False), ("torch", False), ("torch", True)):
        given = [(x.detach().double() if widen else x.detach()).requires_grad_() for x in arguments]
        y = call(*given, *rest, backend=backend)
        results.append((y, *torch.autograd.grad(y, given, grad.to(y.dtype))))
    # A sum over rows has the error of as many roundings of its terms.
    for name, kernel, torch_result, truth in zip(("y", *(f"d {name}" for name in names)), *results, strict=True):
        scale = truth.abs().max().item() * max(1.0, y.numel() / y.shape[-1]) ** 0.5
        assert_as_good_as_torch(name, kernel, torch_result, truth, scale)


def check_gelu(x, weight, bias):
    compare(linear_gelu, ("x", "weight", "bias"), (x, weight, bias))


def check_norm(x, weight, bias, eps=1e-12):
    compare(layer_norm, ("x", "weight", "bias"), (x, weight, bias), eps)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (ROWS + 3, 7), (9, COLUMNS), (2, COLUMNS + 1), (2 * ROWS, 16)], ids=str)
def test_gelu_is_as_good_as_torch(shape, dtype):
    """The gradients of GELU's input and of the bias, from the same input for all, so that no product blurs them."""
    before, grad = random(*shape, dtype=dtype) * 2, random(*shape, dtype=dtype)
    results = []
    for widen in (torch.float32, torch.float64):
        x = before.to(widen).requires_grad_()
        (dx,) = torch.autograd.grad(F.gelu(x), x, grad.to(widen))
        results.append((dx.to(dtype) if widen == torch.float32 else dx, dx.sum(0)))
    kernel = backward.gelu_backward_op(grad, before)
    for name, ours, torch_result, truth in zip(("d x", "d bias"), kernel, *results, strict=True):
        assert_as_good_as_torch(name, ours, torch_result, truth, truth.abs().max().item() * shape[0] ** 0.5)


def test_linear_gelu_is_as_good_as_torch():
    check_gelu(random(2, 5, 24), random(40, 24), random(40))


def test_gelu_far_from_zero():
    """Neither infinite nor NaN, where the exponential and the error function have long reached their limits."""
    x = torch.tensor([[-1e4, -40.0, -0.0, 0.0, 40.0, 1e4]], device=DEVICE)
    dx, dbias = backward.gelu_backward_op(torch.ones_like(x), x)
    assert dx.tolist() == [[0.0, 0.0, 0.5, 0.5, 1.0, 1.0]] and torch.equal(dbias, dx[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (NORM_ROWS + 1, 256), (2, 3, 1000), (2 * NORM_ROWS, 33), (2, 4000)], ids=str)
def test_layer_norm_is_as_good_as_torch(shape, dtype):
    D = shape[-1]
    check_norm(random(*shape, dtype=dtype) * 3 + 1, random(D, dtype=dtype), random(D, dtype=dtype), 1e-5 if D > 1 else 1.0)


@random_shapes
@given(M=st.integers(1, 70), D=st.integers(2, 300), dtype=st.sampled_from(FLOATS), eps=st.sampled_from([1e-12, 1e-5]))
def test_layer_norm_of_any_shape(M, D, dtype, eps):
    check_norm(random(M, D, dtype=dtype), random(D, dtype=dtype), random(D, dtype=dtype), max(eps, 1e-3 if D < 8 else 0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    x = LAYOUTS[layout](random(4, 24))
    check_norm(x, random(24), random(24), 1e-5)
    check_gelu(x, random(12, 24), random(12))
    before, grad = random(4, 24, dtype=torch.float16), random(4, 24, dtype=torch.float16)
    dx, dbias = backward.gelu_backward_op(LAYOUTS[layout](grad), LAYOUTS[layout](before))
    for result, expected in zip((dx, dbias), backward.gelu_backward_op(grad, before), strict=True):
        assert torch.equal(result, expected)


def test_a_row_of_equal_numbers_has_no_gradient():
    x, weight, bias = torch.full((2, 40), 3.0, device=DEVICE, requires_grad=True), random(40, grad=True), random(40, grad=True)
    y = layer_norm(x, weight, bias, 1e-12, backend="triton")
    assert torch.equal(y, bias.expand(2, -1))
    _, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dweight.eq(0).all() and dbias.eq(2).all()


def test_parameters_that_are_frozen_or_of_another_dtype():
    x, weight, bias = random(6, 16, dtype=torch.bfloat16), random(16), random(16, grad=True)
    (dbias,) = torch.autograd.grad(layer_norm(x, weight, bias, 1e-5, backend="triton").float().sum(), bias)
    assert dbias.dtype == torch.float32 and dbias.eq(6).all()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear_gelu(x.float(), random(4, 16), bias[:4], backend="triton")
    (dbias,) = torch.autograd.grad(y.float().sum(), bias)
    assert y.dtype == torch.bfloat16 and dbias.dtype == torch.float32 and dbias[:4].ne(0).all()


def test_references_are_right():
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 5), (4,)))
    before = x @ weight.T + bias
    exact = before * 0.5 * (1 + torch.erf(before / 2**0.5))
    torch.testing.assert_close(reference.linear_gelu(x, weight, bias), exact)
    assert torch.autograd.gradcheck(reference.linear_gelu, (x, weight, bias))
    scale, shift = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(reference.layer_norm(x, scale, shift, 1e-3), normed * scale + shift)
    assert torch.autograd.gradcheck(lambda *given: reference.layer_norm(*given, 1e-3), (x, scale, shift))
