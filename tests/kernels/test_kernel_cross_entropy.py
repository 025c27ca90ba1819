"""token_cross_entropy: losses and gradients against the reference in float64, and the effects of overwriting the logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sctd_kernels import cross_entropy, reference, token_cross_entropy

from helpers.kernels import DEVICE, FLOATS, LAYOUTS, assert_as_good_as_torch, random, random_shapes

BLOCK = cross_entropy.BLOCK_V
SHAPES = [(1, 1), (6, 5), (3, 1000), (2, BLOCK), (2, BLOCK + 1), (2, 2 * BLOCK - 6), (2, 3 * BLOCK + 7)]


def random_labels(N, V, dtype=torch.int64):
    """Every third row is ignored."""
    labels = torch.randint(V, (N,), dtype=dtype, device=DEVICE)
    return labels.where(torch.arange(N, device=DEVICE) % 3 != 1, -100)


def check(logits, labels, overwrite=False):
    grad = random(labels.shape[0])
    results = []
    for backend, widen in (("triton", False), ("torch", False), ("torch", True)):
        x = (logits.detach().double() if widen else logits.detach()).requires_grad_()
        # A product by one, so that what is overwritten is not the leaf that the next backend reads.
        loss = token_cross_entropy(x * 1, labels, overwrite_logits=overwrite, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, x, grad.to(loss.dtype))))
    scale = max(1.0, logits.abs().max().item())
    for name, kernel, torch_result, truth in zip(("loss", "d logits"), *results, strict=True):
        assert_as_good_as_torch(name, kernel, torch_result, truth, scale)
        assert kernel[labels == -100].eq(0).all(), name


def test_example():
    logits = torch.tensor([[0.0, 0.0], [0.0, 9.0]], device=DEVICE)
    labels = torch.tensor([1, -100], device=DEVICE)
    losses = token_cross_entropy(logits, labels, backend="triton")
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.6931472, 0.0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-V{0[1]}".format)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new gradient", "overwritten logits"])
def test_kernel_is_as_good_as_torch(shape, dtype, overwrite):
    check(random(*shape, dtype=dtype) * 4, random_labels(*shape), overwrite)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    check(LAYOUTS[layout](random(4, 120, dtype=torch.float16)), random_labels(4, 120, torch.int32))


@random_shapes
@given(N=st.integers(1, 6), V=st.integers(1, 500), dtype=st.sampled_from(FLOATS), size=st.sampled_from([0.01, 1.0, 50.0]))
def test_any_shape(N, V, dtype, size):
    check(random(N, V, dtype=dtype) * size, random_labels(N, V))


def test_excluded_classes():
    """Logits of -inf take a class out, a whole block of them too."""
    logits = random(2, BLOCK + 100)
    logits[:, :BLOCK] = -float("inf")
    labels = torch.full((2,), BLOCK + 7, device=DEVICE)
    kernel = token_cross_entropy(logits, labels, backend="triton")
    torch.testing.assert_close(kernel, reference.token_cross_entropy(logits, labels))


def test_other_ignore_index():
    logits, labels = random(3, 8), torch.tensor([0, 1, 0], device=DEVICE)
    kernel = token_cross_entropy(logits, labels, ignore_index=0, backend="triton")
    torch.testing.assert_close(kernel, reference.token_cross_entropy(logits, labels, ignore_index=0))
    assert kernel[[0, 2]].tolist() == [0, 0]


def test_a_label_outside_the_vocabulary_is_nan():
    labels = torch.tensor([8, -1, 10**9, 3], device=DEVICE)
    losses = token_cross_entropy(random(4, 8), labels, backend="triton")
    assert losses.isnan().tolist() == [True, True, True, False]


class TestOverwriting:
    """`overwrite_logits` never gives a wrong gradient: whoever still needs the logits gets an error."""

    def loss(self, logits, overwrite=True):
        labels = torch.arange(logits.shape[0], device=DEVICE)
        return token_cross_entropy(logits, labels, overwrite_logits=overwrite, backend="triton").sum()

    def test_the_gradient_lies_over_the_logits(self):
        logits = random(4, 9, grad=True) * 1
        memory = logits.data_ptr()
        (gradient,) = torch.autograd.grad(self.loss(logits), logits)
        assert gradient.data_ptr() == memory and torch.equal(gradient, logits)

    def test_default_leaves_the_logits_alone(self):
        logits = random(4, 9, grad=True) * 1
        before, loss = logits.detach().clone(), self.loss(logits, overwrite=False)
        first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, logits)[0], first)
        assert torch.equal(logits, before)

    def test_a_second_backward_is_refused(self):
        logits = random(4, 9, grad=True) * 1
        loss = self.loss(logits)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_logits_saved_by_another_operation_are_noticed(self):
        logits = random(4, 9, grad=True) * 1
        squares = (logits**2).sum()  # saves the logits
        self.loss(logits).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()

    def test_logits_used_by_another_operation_that_does_not_save_them(self):
        leaf = random(4, 9, grad=True)
        logits = leaf * 2
        (self.loss(logits) + logits.sum()).backward()
        expected = torch.autograd.grad(self.loss(leaf * 2, overwrite=False), leaf)[0] + 2
        torch.testing.assert_close(leaf.grad, expected)

    def test_a_leaf_is_refused(self):
        with pytest.raises(ValueError, match="overwrite_logits"):
            self.loss(random(4, 9, grad=True))

    def test_rows_that_share_memory_are_not_overwritten(self):
        row = random(1, 9, grad=True)
        logits = (row * 1).expand(4, 9)
        (overwriting,) = torch.autograd.grad(self.loss(logits), row)
        (plain,) = torch.autograd.grad(self.loss((row * 1).expand(4, 9), overwrite=False), row)
        assert torch.equal(overwriting, plain)


def test_reference_is_right():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3, 3])
    losses = reference.token_cross_entropy(logits, labels)
    for n, label in enumerate(labels.tolist()):
        expected = 0.0 if label < 0 else (logits[n].exp().sum().log() - logits[n, label]).item()
        assert abs(losses[n].item() - expected) < 1e-12
    assert torch.autograd.gradcheck(lambda x: reference.token_cross_entropy(x, labels), logits)
