"""Operations of a step: as counted by hand for published models, and as counted while a step runs."""

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sctd_ds
from sctd_ds import ConfigError, ScTDConfig
from sctd_ds.adapters import huggingface
from sctd_ds.method.flops import Shape, flops_saved, sequence_flops
from sctd_ds.run import job, models

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


def test_operations_of_modernbert_at_512():
    """GFLOP per sequence, forward and backward: by hand, and with the attention that a mask leaves out."""
    base = Shape.of(transformers.ModernBertConfig(vocab_size=50368), length=512, labels=153)
    d, f, v = 768, 1152, 50368
    pairs = 8 * 512 * 512 + 14 * (512 * 129 - 64 * 65)  # layers 1, 4, 7 ... 22 are global
    dense = 3 * (22 * 512 * (8 * d * d + 6 * d * f) + 4 * d * pairs + 2 * 153 * d * (d + v))
    whole = ScTDConfig(last_layer="all")
    assert sequence_flops(base, whole, "dense") == dense
    computed = sequence_flops(replace(base, operations=replace(base.operations, windows=())), whole, "dense")
    assert computed - dense == 3 * 4 * d * (22 * 512 * 512 - pairs)
    modes = ("dense", "drop", "align")
    assert [round(sequence_flops(base, ScTDConfig(), m) / 1e9, 1) for m in modes] == [392.3, 300.7, 525.8]


def test_operations_of_the_shipped_modernbert_are_those_of_the_docs():
    run = job.load("modern")
    counted = Shape.of(models.model_config(run.pretrain), length=1024, labels=307)
    computed = replace(counted, operations=replace(counted.operations, windows=()))
    assert [round(100 * flops_saved(shape, run.sctd), 1) for shape in (counted, computed)] == [18.0, 20.2]
    counts = (sequence_flops(shape, run.sctd, "dense") for shape in (computed, counted))
    assert int(100 * next(counts) / next(counts)) == 114


@pytest.mark.parametrize("window", range(6))
def test_pairs_within_a_window_are_those_of_the_average_choice_of_tokens(window):
    shape = Shape(1, 1, 1, 1, length=6, labels=0)
    for keys, queries in ((6, 6), (6, 3), (4, 4), (3, 2), (1, 1)):
        found = [
            sum(abs(i - j) <= window for i in chosen for j in context)
            for context in itertools.combinations(range(6), keys)
            for chosen in itertools.combinations(context, queries)
        ]
        assert shape.pairs(queries, keys, window) == pytest.approx(statistics.fmean(found))


# Counted while a step runs: each product of matrices, forward and backward, as torch dispatches it

SIZES = {"hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 2, "vocab_size": 96, "max_position_embeddings": 24}
SPECIAL = {f"{name}_token_id": 0 for name in ("pad", "cls", "sep", "bos", "eos")}
TOYS = {
    "BERT": transformers.BertConfig(**SIZES, intermediate_size=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "ModernBERT": transformers.ModernBertConfig(**SIZES, **SPECIAL, intermediate_size=48, local_attention=6),
}
LENGTH, LABELS, ROWS = 24, 4, 4
every_toy = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


def toy_model(toy: transformers.PreTrainedConfig) -> nn.Module:
    return transformers.AutoModelForMaskedLM.from_config(toy).train()


def computed_shape(toy: transformers.PreTrainedConfig) -> Shape:
    """Attention runs with a mask, so local layers compute all pairs of tokens."""
    shape = Shape.of(toy, length=LENGTH, labels=LABELS)
    return replace(shape, operations=replace(shape.operations, windows=()))


def operations_done(model: nn.Module, padded: bool = True) -> int:
    """Of one forward and backward over ROWS rows, each with LABELS labels; padded: one of them by 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, SIZES["vocab_size"], (ROWS, LENGTH), generator=generator)
    labelled = torch.rand(ROWS, LENGTH - 4, generator=generator).argsort(1)[:, :LABELS]
    labels = torch.full_like(ids, -100).scatter(1, labelled, ids.gather(1, labelled))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    # Attention as plain products: a fused kernel's backward computes the scores again, which no plan counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask if padded else None, labels=labels).loss.backward()
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
@every_toy
def test_a_step_does_the_operations_of_its_plan(toy, mode, settings):
    config = ScTDConfig(keep_token_ids=[0], labels_per_row=LABELS, **settings)
    model = sctd_ds.convert(toy_model(toy), config)
    sctd_ds.set_mode(model, mode, step=3)
    assert operations_done(model) == ROWS * sequence_flops(computed_shape(toy), config, mode)


@every_toy
def test_counted_are_the_operations_done_less_those_on_pairs_that_a_mask_hides(toy, monkeypatch):
    hidden = []

    def attend(query, key, value, mask, dropout):
        every = query.shape[0] * query.shape[2] * key.shape[2]
        seen = every if mask is None else mask.expand(len(query), 1, query.shape[2], key.shape[2]).sum().item()
        hidden.append(every - seen)
        return plain_attend(query, key, value, mask, dropout)

    plain_attend = huggingface.attend
    monkeypatch.setattr(huggingface, "attend", attend)
    config = ScTDConfig(method="dense", keep_token_ids=[0], labels_per_row=LABELS, last_layer="all")
    done = operations_done(sctd_ds.convert(toy_model(toy), config), padded=False)
    assert len(hidden) == toy.num_hidden_layers and (sum(hidden) > 0) == (toy.model_type == "modernbert")
    counted = sequence_flops(Shape.of(toy, length=LENGTH, labels=LABELS), config, "dense")
    assert done - 3 * 4 * toy.hidden_size * sum(hidden) == ROWS * counted


@every_toy
def test_an_untouched_model_does_its_operations_and_a_dense_step_fewer(toy):
    plain = operations_done(toy_model(toy))
    assert plain == ROWS * sequence_flops(computed_shape(toy), ScTDConfig(), "dense", head_rows=LENGTH)
    config = ScTDConfig(method="dense", keep_token_ids=[0], labels_per_row=LABELS)
    assert operations_done(sctd_ds.convert(toy_model(toy), config)) < plain
