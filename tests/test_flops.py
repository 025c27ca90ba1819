"""Operations of a step: as counted by hand for published models, and as counted while a step runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

import sctd_ds
from helpers.bert import small_bert
from sctd_ds import ConfigError, ScTDConfig
from sctd_ds.method.flops import Shape, flops_saved, sequence_flops

LARGE, BASE = Shape(24, 1024, 4096, 30522, 512, 77), Shape(12, 768, 3072, 30522, 512, 77)


def test_operations_of_bert_at_512():
    """GFLOP per sequence, forward and backward, as counted by hand for the published models."""
    modes = ("dense", "drop", "align")
    whole = ScTDConfig(last_layer="all")
    assert [round(sequence_flops(LARGE, whole, m) / 1e9, 1) for m in modes] == [1019.9, 763.1, 1322.4]
    assert [round(sequence_flops(BASE, whole, m) / 1e9, 1) for m in modes] == [301.0, 227.3, 407.5]
    two_passes = ScTDConfig(shared_prefix=False, last_layer="all")
    assert round(sequence_flops(LARGE, two_passes, "align") / 1e9, 1) == 1783.0


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_last_layer_costs_what_its_positions_cost(mode):
    """77 labelled tokens and [CLS] instead of 512, in everything but the keys and values: 10/12 of the products and QK, PV."""
    per_position = 3 * (4 * 1024 * 1024 + 4 * 1024 * 4096 + 4 * 512 * 1024)
    whole, narrow = (sequence_flops(LARGE, ScTDConfig(last_layer=x), mode) for x in ("all", "labelled"))
    assert whole - narrow == (2 if mode == "align" else 1) * (512 - 78) * per_position
    # A plain model's last layer runs everywhere.
    assert sequence_flops(LARGE, ScTDConfig(), "dense", head_rows=77) == sequence_flops(
        LARGE, ScTDConfig(last_layer="all"), "dense"
    )


def test_savings_of_bert_large():
    whole = [ScTDConfig(interval=i, last_layer="all") for i in (5, 10, 20, 50)]
    assert [round(100 * flops_saved(LARGE, config), 1) for config in whole] == [14.2, 19.7, 22.4, 24.1]
    assert [round(100 * flops_saved(LARGE, ScTDConfig(interval=i)), 1) for i in (5, 10, 20, 50)] == [15.3, 20.6, 23.3, 24.9]
    spread = ScTDConfig(interval=10, align_schedule="spread")
    assert flops_saved(LARGE, spread) == pytest.approx(flops_saved(LARGE, ScTDConfig(interval=10)))
    assert flops_saved(LARGE, ScTDConfig(method="dense")) == 0


def test_a_dense_model_may_have_fewer_layers_than_dropping_needs():
    shallow = Shape(2, 64, 256, 1000, 128, 19)
    assert flops_saved(shallow, ScTDConfig(method="dense")) == 0
    with pytest.raises(ConfigError, match="at least 4"):
        flops_saved(shallow, ScTDConfig())


# Counted while a step runs: each product of matrices, forward and backward, as torch dispatches it

TOY = Shape(layers=7, hidden=32, intermediate=80, vocabulary=96, length=24, labels=4)
ROWS = 4


def toy_model() -> BertForMaskedLM:
    sizes = {"hidden_size": TOY.hidden, "intermediate_size": TOY.intermediate, "vocab_size": TOY.vocabulary}
    return small_bert(**sizes, num_hidden_layers=TOY.layers, max_position_embeddings=TOY.length).train()


def operations_done(model: BertForMaskedLM) -> int:
    """Of one forward and backward over ROWS rows, each with TOY.labels labels and one of them padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, TOY.vocabulary, (ROWS, TOY.length), generator=generator)
    labelled = torch.rand(ROWS, TOY.length - 4, generator=generator).argsort(1)[:, : TOY.labels]
    labels = torch.full_like(ids, -100).scatter(1, labelled, ids.gather(1, labelled))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    # Attention as plain products: a fused kernel's backward computes the scores again, which no plan counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    return counter.get_total_flops()


SETTINGS = {
    "default": {},
    "separate prefixes": {"shared_prefix": False},
    "whole last layer": {"last_layer": "all"},
    "other drop ratio": {"drop_ratio": 0.3},
    "released objective": {"objective": "released"},
    "spread": {"align_schedule": "spread", "interval": ROWS},  # in every step one row aligns
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_a_step_does_the_operations_of_its_plan(mode, settings):
    config = ScTDConfig(keep_token_ids=[0], labels_per_row=TOY.labels, **settings)
    model = sctd_ds.convert(toy_model(), config)
    sctd_ds.set_mode(model, mode, step=3)
    assert operations_done(model) == ROWS * sequence_flops(TOY, config, mode)


def test_an_untouched_model_does_its_operations_and_a_dense_step_fewer():
    plain = operations_done(toy_model())
    assert plain == ROWS * sequence_flops(TOY, ScTDConfig(), "dense", head_rows=TOY.length)
    config = ScTDConfig(method="dense", keep_token_ids=[0], labels_per_row=TOY.labels)
    assert operations_done(sctd_ds.convert(toy_model(), config)) < plain
