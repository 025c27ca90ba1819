"""On a CPU too a step costs what its operations cost: ratios of processor time, which other programs hardly change."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import train_step
from benchmarks.train_step import ALIGN, HUGGING_FACE, VARIANTS, Case, Setup, Trainer

# Dropout is left out: it costs time but no counted operation, and more of it per token in attention than elsewhere.
MODEL = {
    "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 4096,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CASE = Case("small", 512, 1)
AT_LEAST_ROUNDS, AT_MOST_SECONDS = 8, 45


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_steps_cost_what_their_operations_cost(one_thread, monkeypatch):
    """Minima of interleaved steps: what disturbs a step can only lengthen it, so more rounds bring them nearer the truth."""
    monkeypatch.setitem(train_step.MODELS, "small", MODEL)
    variants = {variant.name: variant for variant in VARIANTS if variant.name in (HUGGING_FACE, "dense", "drop", ALIGN)}
    trainer = Trainer("small", Setup(torch.device("cpu"), "fp32", compile=False))
    (batch,) = CASE.batches(torch.device("cpu"), count=1)
    ideal = {name: CASE.flops(variant) / CASE.flops(variants["dense"]) for name, variant in variants.items()}
    least = dict.fromkeys(variants, float("inf"))
    start, rounds = time.perf_counter(), 0
    while True:
        for name, variant in variants.items():
            trainer.choose(variant, CASE)
            began = time.process_time()
            trainer.step(batch)
            least[name] = min(least[name], time.process_time() - began)
        rounds += 1
        ratio = {name: seconds / least["dense"] for name, seconds in least.items()}
        saving_reached = (1 - ratio["drop"]) / (1 - ideal["drop"])
        align_over_ideal = ratio[ALIGN] / ideal[ALIGN]
        good = saving_reached >= 0.9 and align_over_ideal <= 1.1 and ratio[HUGGING_FACE] >= 1
        if (good and rounds >= AT_LEAST_ROUNDS) or time.perf_counter() - start > AT_MOST_SECONDS:
            break
    trainer.close()
    assert saving_reached >= 0.9, f"a drop step reaches {saving_reached:.0%} of its ideal saving of {1 - ideal['drop']:.1%}"
    assert align_over_ideal <= 1.1, f"an align step costs {align_over_ideal:.2f} times its ideal"
    assert ratio[HUGGING_FACE] >= 1, (
        f"our dense step takes {1 / ratio[HUGGING_FACE]:.2f} times as long as the untouched model's"
    )
