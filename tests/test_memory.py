"""Computed memory: against what autograd keeps, what real engines hold, and what is known from the literature."""

import gc
import re
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import BertTokenizer

import sctd_ds
from helpers.bert import small_bert
from sctd_ds.config import ConfigError
from sctd_ds.engine import ranks
from sctd_ds.run import job, memory, models, probe
from sctd_ds.run.memory import allocated, compute, engine_states

ROWS, LENGTH, VOCABULARY = 4, 32, 640
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(VOCABULARY - 5))]
PACKED = SimpleNamespace(tokenizer=BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}))


def run_of(ranks: int = 1, sctd: dict | None = None, pretrain: dict | None = None, sizes: dict | None = None, **deepspeed):
    """A run of small sizes; `deepspeed` replaces blocks of its configuration."""
    zero = {"stage": 2, "reduce_bucket_size": 50_000}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": zero,
        "steps_per_print": 1000000000,
        "sctd": sctd or {},
        "pretrain": {"model": {**SIZES, **(sizes or {})}, "seq_length": LENGTH, "steps": 100, **(pretrain or {})},
        **deepspeed,
    }
    return job.load(config, world_size=ranks)


def real_model(run):
    """The run's model with real weights."""
    model = small_bert(vocab_size=VOCABULARY, **run.pretrain.model, max_position_embeddings=512,
                       hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)  # fmt: skip
    return sctd_ds.convert(model.train(), models.method_of(run, PACKED))


@pytest.mark.parametrize(
    ("mode", "sctd"),
    [("dense", {}), ("drop", {}), ("align", {}), ("align", {"recompute_align": True}), ("align", {"align_schedule": "spread"})],
)
def test_what_is_counted_is_what_autograd_really_keeps_and_allocates(mode, sctd):
    run = run_of(sctd={"interval": 2, **sctd})
    model = real_model(run)
    peak = allocated(model, mode, ROWS, LENGTH, 2)
    with memory._without_data(gpu=False) as device:
        assert allocated(memory._build(run, PACKED, device), mode, ROWS, LENGTH, 2) == pytest.approx(peak, rel=1e-3)

    saved: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    sctd_ds.set_mode(model, mode, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    kept = sum(saved.values())
    assert kept < peak
    with memory.Live([*model.parameters(), *model.buffers(), ids]) as live:
        again = model(input_ids=ids, labels=ids).loss
    assert live.now == pytest.approx(kept, rel=0.03)  # beside them are the loss and its parts
    del loss, again


def test_a_layer_on_a_gpu_keeps_what_the_literature_says():
    """34 bytes per token and hidden unit of a layer whose attention keeps no scores (Korthikanti et al., 2022), and fp32 sums:
    one of attention per head and two of each LayerNorm."""
    peaks = {}
    for layers in (4, 5):
        run = run_of(
            sizes={"num_hidden_layers": layers}, bf16={"enabled": True}, pretrain={"probe_steps": 0}, sctd={"method": "dense"}
        )
        peaks[layers] = compute(run, PACKED, gpu=True).step["dense"]
    heads, hidden = SIZES["num_attention_heads"], SIZES["hidden_size"]
    assert peaks[5] - peaks[4] == pytest.approx(ROWS * LENGTH * (34 * hidden + 4 * heads + 16), rel=1e-3)


@pytest.mark.parametrize("sizes", [{}, {"model_type": "modernbert", "local_attention": 8}], ids=["bert", "modernbert"])
def test_masks_inside_of_rows_take_memory(sizes):
    """Those of documents, and of ModernBERT's windows."""
    dense, masked = (
        compute(run_of(sizes=sizes, bf16={"enabled": True}, sctd={"method": "dense", **more}), PACKED, gpu=True).step["dense"]
        for more in ({}, {"document_mask": True})
    )
    assert masked >= dense + ROWS * LENGTH**2


def test_modes_and_rows_take_what_they_should():
    def needs(rows=ROWS, steps_timed=0, **sctd):
        precision = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": rows}
        return compute(run_of(sctd=sctd, pretrain={"probe_steps": steps_timed}, **precision), PACKED, gpu=True)

    align = needs(steps_timed=1)
    assert align.step["drop"] < align.step["dense"] < align.step["align"] and "huggingface" in align.step
    assert needs(recompute_align=True).step["align"] < align.step["align"]
    plain = needs(method="token_drop")
    assert plain.step == {mode: align.step[mode] for mode in ("dense", "drop")}
    card = 3 * plain.peak
    rows = plain.most_rows(card)
    more = needs(rows, method="token_drop")
    assert more.peak <= (1 - memory.SPARE) * card < more.peak + 0.1 * rows * more.per_row["dense"]
    assert more.per_row == pytest.approx(plain.per_row, rel=0.05)
    assert plain.most_rows(plain.held / 2) == 0


CASES = {
    "fp32-zero2": {},
    "bf16-zero2-fp32-sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16-zero1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000}},
    "bf16-zero1-fp32-sums": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000},
    },
    "fp32-zero0": {"zero_optimization": {"stage": 0}},
    "bf16-zero0": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
}


def storages() -> dict[int, int]:
    gc.collect()
    found = [tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    return {storage._cdata: storage.nbytes() for storage in found}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_a_real_engine(case):
    ranks.init_distributed()
    run = run_of(pretrain={"probe_steps": 0}, **CASES[case])
    before = storages()
    engine = probe.start_engine(real_model(run), run.deepspeed)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    labels = torch.where(torch.arange(LENGTH) < 3, ids, -100)
    engine.backward(engine(input_ids=ids, labels=labels).loss)
    engine.step()  # in which Adam makes its moments
    engine.backward(engine(input_ids=ids, labels=labels).loss)
    held = sum(size for key, size in storages().items() if key not in before)
    parameters = sum(p.numel() for p in engine.module.parameters())
    states, _ = engine_states(run, parameters, gpu=False)
    engine.destroy()
    assert sum(states.values()) == pytest.approx(held, rel=0.08), (states, held / parameters)


@pytest.mark.parametrize("devices", [1, 8])
def test_states_of_zero_2_in_16_bits_are_deepspeeds_own_estimate(devices):
    fused = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
    run = run_of(devices, bf16={"enabled": True}, optimizer=fused)
    states, update = engine_states(run, 1_000_000, gpu=True)
    _, estimate = estimate_zero2_model_states_mem_needs(1_000_000, devices, cpu_offload=False)
    assert states.pop("buckets") == 2 * 50_000
    assert sum(states.values()) + update == estimate


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("h100:8", memory.Machine("h100", 8, 80e9)),
        ("A100-40GB:2", memory.Machine("a100-40gb", 2, 40e9)),
        ("24GB", memory.Machine("24gb", 1, 24e9)),
        ("1.5gb:16", memory.Machine("1.5gb", 16, 1.5e9)),
    ],
)
def test_machines(text, machine):
    assert memory.parse_machine(text) == machine


@pytest.mark.parametrize(
    ("text", "words"),
    [("h10:8", 'did you mean "h100"'), ("abacus", "known: a10, a100-40gb"), ("h100:0", 'found "0"'), ("h100:x", "h100:8")],
)
def test_machines_that_are_none(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        memory.parse_machine(text)


@pytest.mark.parametrize(("memory_bytes", "words"), [(1e9, "it fits"), (10.5e6, "it barely fits"), (9e6, "it does not fit")])
def test_the_verdict_leaves_a_tenth_to_what_is_not_counted(memory_bytes, words):
    needs = memory.Needs(8, {"parameters": 4_000_000}, {"dense": 6_000_000}, 1, {"dense": 500_000})
    lines = needs.lines(memory.Machine("card", 1, memory_bytes))
    assert lines[0].endswith(words)
    rows = {1e9: 8 + 1780, 10.5e6: 6, 9e6: 4}[memory_bytes]  # (0.9 * memory - 4 MB) / 0.5 MB - 4
    assert any(f"of up to {rows} rows fit" in line for line in lines)


@pytest.mark.parametrize(("deepspeed", "pretrain", "words"), [
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, "offload_optimizer"),
    ({"zero_optimization": {"stage": 1}}, {"stages": 2}, "pipelines"),
    ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}}, {}, "OneBitAdam"),
])  # fmt: skip
def test_what_cannot_be_computed_is_said(deepspeed, pretrain, words):
    with pytest.raises(ConfigError, match=words):
        compute(run_of(2, pretrain=pretrain, **deepspeed), PACKED, gpu=True)
