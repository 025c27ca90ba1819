"""The model trains the same through the kernels as through their twins: what the main job relies on."""

import copy

import sctd_kernels.api
import torch
from transformers import BertConfig, BertForMaskedLM

import sctd_ds
from helpers.kernels import DEVICE

STEPS, ROWS, LENGTH = 4, 2, 12


def train(model, kernels, monkeypatch):
    """A few plain SGD steps, every second one an align step; returns losses, weights and the importance table."""
    monkeypatch.setattr(sctd_kernels.api, "_use_triton", lambda backend, x: kernels)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(5, 40, (ROWS, LENGTH), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, 2], labels[:, 7] = ids[:, 2], ids[:, 7]
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        sctd_ds.set_mode(model, "align" if step % 2 else "drop")
        loss = model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE), labels=labels.to(DEVICE)).loss
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()
        sctd_ds.importance(model).update()
        losses.append(loss.detach())
    return torch.stack(losses), dict(model.named_parameters()), sctd_ds.importance(model).scores


def test_training_through_kernels_is_training_through_their_references(monkeypatch):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    settings = sctd_ds.ScTDConfig(keep_token_ids=[1, 2, 3, 4], labels_per_row=3, kl_weight=5.0)
    model = sctd_ds.convert(BertForMaskedLM(config).to(DEVICE), settings)
    plain = copy.deepcopy(model)
    losses, weights, scores = train(model, True, monkeypatch)
    expected_losses, expected_weights, expected_scores = train(plain, False, monkeypatch)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-6, msg=name)
    assert losses[-1] != losses[0] and not torch.equal(scores, torch.full_like(scores, 10.0))
