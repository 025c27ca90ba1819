"""Training through the kernels, in which the gradient of the logits overwrites them, is training through their references."""

import copy

import pytest
import sctd_kernels.api
import torch
from sctd_kernels import cross_entropy
from transformers import BertConfig, BertForMaskedLM

import sctd_ds
from helpers.kernels import DEVICE
from sctd_ds.adapters.huggingface import BertAdapter
from sctd_ds.method.convert import state_of

LENGTH, LABELS, ROWS, VOCABULARY = 12, 3, 4, 40


def model(**settings):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    method = {"keep_token_ids": [1, 2, 3, 4], "labels_per_row": LABELS, "kl_weight": 5.0, "interval": 2}
    return sctd_ds.convert(BertForMaskedLM(config).to(DEVICE), sctd_ds.ScTDConfig(**method, **settings))


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=generator)
        at = 1 + torch.rand(ROWS, LENGTH - 1, generator=generator).argsort(1)[:, :LABELS]
        labels = torch.full_like(ids, -100).scatter(1, at, ids.gather(1, at))
        yield {"input_ids": ids.scatter(1, at, 4), "labels": labels}


def train(converted, accumulation, zero, gradient_checkpointing):
    """Losses of four optimizer steps with the real engine, and the weights and table at their end."""
    if gradient_checkpointing:
        converted.gradient_checkpointing_enable()
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},  # Adam would blow up the rounding of gradients near zero
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero},
        "steps_per_print": 1_000_000_000,
    }
    engine, *_ = sctd_ds.initialize(model=converted, model_parameters=converted.parameters(), config=settings)
    rows = batches()
    losses = torch.tensor([engine.train_batch(rows) for _ in range(4)])
    weights = {name: parameter.detach().clone() for name, parameter in converted.named_parameters()}
    scores = sctd_ds.importance(converted).scores.clone()
    engine.destroy()
    return losses, weights, scores


@pytest.mark.parametrize(
    ("accumulation", "zero", "gradient_checkpointing", "settings"),
    [
        (1, 0, False, {}),
        (2, 1, False, {"align_schedule": "spread"}),
        (2, 2, False, {"recompute_align": True}),
        (1, 2, True, {"shared_prefix": False}),
    ],
)
def test_overwritten_logits_change_nothing(accumulation, zero, gradient_checkpointing, settings, monkeypatch):
    overwritten = []
    overwrite = cross_entropy.cross_entropy_backward_op_
    monkeypatch.setattr(
        cross_entropy, "cross_entropy_backward_op_", lambda *given: overwritten.append(given[1].shape) or overwrite(*given)
    )
    through_kernels = model(**settings)
    through_references = copy.deepcopy(through_kernels)
    runs = []
    for converted, kernels in ((through_kernels, True), (through_references, False)):
        monkeypatch.setattr(sctd_kernels.api, "_use_triton", lambda backend, x, kernels=kernels: kernels)
        runs.append(train(converted, accumulation, zero, gradient_checkpointing))
    (losses, weights, scores), (expected_losses, expected_weights, expected_scores) = runs
    assert len(overwritten) >= 4 * accumulation and set(overwritten) <= {(n * LABELS, VOCABULARY) for n in (ROWS, ROWS // 2)}
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_pass_backward_changes_nothing(compiled, monkeypatch):
    """The Triton kernels of GELU and LayerNorm against the model's own modules."""
    monkeypatch.setattr(sctd_kernels.api, "_use_triton", lambda backend, x: True)
    runs = []
    for one_pass in (True, False):
        monkeypatch.setattr(BertAdapter, "one_pass_backward", one_pass)
        converted = model()
        if compiled and one_pass:
            state_of(converted).encoder.compile(fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        sctd_ds.set_mode(converted.train(), "align")
        loss = converted(**{name: tensor.to(DEVICE) for name, tensor in next(batches()).items()}).loss
        loss.backward()
        runs.append((loss, {name: parameter.grad for name, parameter in converted.named_parameters()}))
    (loss, gradients), (expected_loss, expected) = runs
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
