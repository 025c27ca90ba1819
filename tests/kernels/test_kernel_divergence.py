"""softmax_kl: the kernel against the reference in float64, and the reference against finite differences and torch's KL."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sctd_kernels import divergence, reference, softmax_kl

from helpers.kernels import DEVICE, FLOATS, LAYOUTS, assert_as_good_as_torch, random, random_shapes

# The interpreter computes lanes beyond the end of a row and then drops them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")

SHAPES = [(1, 1), (5, 3), (2, 256), (3, 1000), (2, 1024), (1, 4096), (2, 9001)]


def check(teacher, student):
    grad = random(teacher.shape[0])
    results = []
    for backend, widen in (("triton", False), ("torch", False), ("torch", True)):
        t, s = ((x.detach().double() if widen else x.detach()).requires_grad_() for x in (teacher, student))
        kl = softmax_kl(t, s, backend=backend)
        results.append((kl, *torch.autograd.grad(kl, (t, s), grad.to(kl.dtype))))
    # Log-probabilities are known to a rounding of the inputs' spread; a gradient is a difference of probabilities times them.
    inputs = [x.detach().double() for x in (teacher, student)]
    spread = max(1.0, *((x.amax(1) - x.amin(1)).max().item() for x in inputs))
    largest = max(x.softmax(1).max().item() for x in inputs) * grad.abs().max().item()
    for name, kernel, torch_result, truth in zip(("kl", "d teacher", "d student"), *results, strict=True):
        assert_as_good_as_torch(name, kernel, torch_result, truth, spread if name == "kl" else spread * largest)


def test_example():
    teacher = torch.tensor([[0.0, 0.0], [1.0, 2.0]], device=DEVICE)
    student = torch.tensor([[0.0, 1.0], [1.0, 2.0]], device=DEVICE)
    kl = softmax_kl(teacher, student, backend="triton")
    torch.testing.assert_close(kl.cpu(), torch.tensor([0.12011451, 0.0]), atol=5e-7, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-D{0[1]}".format)
def test_kernel_is_as_good_as_torch(shape, dtype):
    check(random(*shape, dtype=dtype), random(*shape, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [256, 77])
def test_any_layout(layout, D):
    change = LAYOUTS[layout]
    check(change(random(4, D, dtype=torch.bfloat16)), change(random(4, D, dtype=torch.bfloat16)))


@random_shapes
@given(N=st.integers(1, 5), D=st.integers(1, 700), dtype=st.sampled_from(FLOATS), size=st.sampled_from([0.01, 1.0, 30.0]))
def test_any_shape(N, D, dtype, size):
    check(random(N, D, dtype=dtype) * size, random(N, D, dtype=dtype) * size)


@pytest.mark.parametrize("D", [100, 9001], ids=["one block", "three blocks"])
def test_an_offset_of_a_row_costs_no_precision(D):
    x, y = random(3, D).round(decimals=1), random(3, D).round(decimals=1)
    shifted = softmax_kl(x + 4096, y - 4096, backend="triton")
    torch.testing.assert_close(shifted, softmax_kl(x + 4096, y - 4096, backend="torch"), atol=1e-5, rtol=1e-5)


def test_maxima_in_any_block():
    """The running maxima are rescaled when a later block holds a larger number, and only then."""
    x, y = random(3, 9001), random(3, 9001)
    x[0, 0] = x[1, 5000] = x[2, 9000] = y[2, 0] = y[0, 5000] = y[1, 9000] = 60.0
    check(x, y)


def test_equal_rows_diverge_by_nothing():
    x = random(4, 500)
    kl = softmax_kl(x, x.clone(), backend="triton")
    assert kl.abs().max() < 1e-6


def test_gradients_that_are_not_needed_are_not_computed():
    teacher, student, grad = random(3, 50), random(3, 50), random(3)
    _, stats = divergence.softmax_kl_forward_op(teacher, student)
    dteacher, dstudent = divergence.softmax_kl_backward_op(grad, teacher, student, stats, False, True)
    assert dteacher.numel() == 0 and dstudent.shape == student.shape
    detached = softmax_kl(teacher, student.requires_grad_(), backend="triton")
    assert torch.equal(torch.autograd.grad(detached, student, grad)[0], dstudent)
    only_teacher = softmax_kl(teacher.requires_grad_(), student.detach(), backend="triton")
    (dteacher,) = torch.autograd.grad(only_teacher, teacher, grad)
    torch.testing.assert_close(dteacher, torch.autograd.grad(reference.softmax_kl(teacher, student), teacher, grad)[0])


def test_expanded_gradient():
    student = random(3, 50, grad=True)
    teacher = random(3, 50)
    (kernel,) = torch.autograd.grad(softmax_kl(teacher, student, backend="triton").sum(), student)
    (expected,) = torch.autograd.grad(softmax_kl(teacher, student, backend="torch").sum(), student)
    torch.testing.assert_close(kernel, expected)


def test_reference_is_right():
    teacher = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    torch_kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(reference.softmax_kl(teacher, student), torch_kl)
    assert torch.autograd.gradcheck(reference.softmax_kl, (teacher, student))
