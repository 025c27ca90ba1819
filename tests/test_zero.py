"""The update of ZeRO 1 and 2: DeepSpeed's numbers bit for bit, few operations, and no stop of the host but one."""

import logging
from functools import partial

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

import sctd_ds
from benchmarks import steps
from helpers import ROOT
from helpers.bert import small_bert
from helpers.host_stops import HostStops, answering_as_gpu
from helpers.scenarios import run_scenarios, scenario
from sctd_ds.engine import zero
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.run import settings

LENGTH, VOCABULARY, ACCUMULATION = 16, 64, 2
METHOD = {"interval": 2, "keep_token_ids": [1, 2, 3, 4], "labels_per_row": 3}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """The scenarios of this file on one rank and on two: launches[world][rank] reads what they returned."""
    folder = tmp_path_factory.mktemp("zero")
    return {world: run_scenarios(__name__, folder, ranks=world) for world in (1, 2)}


@pytest.fixture(params=[(1, 0), (2, 0), (2, 1)], ids=["one-rank", "first-of-two", "second-of-two"])
def rank(request, launches):
    """Each rank of each launch in turn."""
    world, index = request.param
    return launches[world][index]


@pytest.fixture
def fp16(monkeypatch):
    """fp16 for engines of the test process itself."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.bfloat16, torch.half])


def allow_fp16():
    """fp16 for engines of a launch: torch computes in it on a CPU, too, but DeepSpeed does not offer it there."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.half]


def make_engine(model=None, **blocks):
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 1},
        "sctd": METHOD,
        **blocks,
    }
    model = model or small_bert(vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def micro_batches(engine, rank=0):
    generator = torch.Generator().manual_seed(7 + rank)
    while True:
        ids = torch.randint(5, VOCABULARY, (engine.train_micro_batch_size_per_gpu(), LENGTH), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, 3:6] = ids[:, 3:6]
        yield {"input_ids": ids.index_fill(1, torch.arange(3, 6), 4), "labels": labels}


# Where the host stops


def shipped(name, world):
    """DeepSpeed's settings of a run of ds_configs/, with tiny batches, and buckets that are small for a tiny model, too."""
    sizes = {"train_batch_size": 4 * world, "train_micro_batch_size_per_gpu": 2, "zero_optimization.reduce_bucket_size": 4000}
    file = ROOT / "ds_configs" / f"{name}.json"
    return settings.load(file, [f"{key}={value}" for key, value in sizes.items()], world).deepspeed


OVERLAP = {"overlap_comm": True, "reduce_bucket_size": 4000}
CONFIGURATIONS = {
    "large": lambda world: shipped("large", world),
    "zero1": lambda world: {**shipped("large", world), "zero_optimization": {"stage": 1, **OVERLAP}},
    "recipe": lambda world: {"zero_optimization": {"stage": 2, **OVERLAP}},
}


def stops_of_a_step(engine, host, waits):
    """What stops the host in the calls of the fourth step, and the waits between streams in its last backward pass.

    DeepSpeed's timer starts with the third step. The fourth one aligns.
    """
    batches, stops, between = micro_batches(engine, engine.global_rank), [], []
    for call in range(4 * ACCUMULATION):
        before = len(host.stops), len(waits)
        loss = engine(**next(batches)).loss
        engine.backward(loss)
        after = len(host.stops)
        engine.step()
        if call >= 3 * ACCUMULATION:
            stops.append((host.stops[before[0] : after], host.stops[after:]))
            between = waits[before[1] :]
    return {"stops": stops, "waits": between}


@scenario(cases=CONFIGURATIONS)
def stops(here, name):
    allow_fp16()
    host = HostStops()
    with answering_as_gpu(host) as waits:
        engine = make_engine(**CONFIGURATIONS[name](here.world))
        with host:
            found = stops_of_a_step(engine, host, waits)
    return {**found, "applied": engine.applied_steps}


@pytest.mark.parametrize("name", sorted(set(CONFIGURATIONS) - {"recipe"}))
def test_a_step_stops_the_host_once_and_a_micro_batch_never(rank, name):
    found = rank(stops, name)
    assert found["applied"] == 4
    assert found["stops"] == [([], []), ([], ["tolist"])]


@pytest.mark.parametrize("name", ["base", "base_fast", "adapt"])
def test_what_is_shipped_has_one_engine(fp16, name):
    keys = ("zero_optimization", "timers", "fp16", "data_types", "gradient_clipping")
    assert [shipped(name, 1)[key] for key in keys] == [shipped("large", 1)[key] for key in keys]


def test_a_step_of_the_benchmarks_stops_the_host_once(fp16, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setitem(steps.MODELS, "small", sizes)
    device, case, host = torch.device("cpu"), steps.Case("small", LENGTH, 2), HostStops()
    with answering_as_gpu(host):
        trainer = steps.Trainer("small", steps.Setup(device, "fp16", compile=False, accumulation=ACCUMULATION))
        trainer.start_engine()
        trainer.choose(steps.BY_NAME["align"], case)
        (batch,) = case.batches(device, count=1)
        for _ in range(3):
            trainer.step(batch)
        before = len(host.stops)
        with host:
            trainer.step(batch)
        assert host.stops[before:] == ["tolist"]
        trainer.close()


def test_deepspeeds_timer_would_stop_the_host_twice_per_micro_batch(rank):
    assert rank(stops, "recipe")["stops"] == [(["synchronize"], ["synchronize"]), (["synchronize"], ["tolist", "synchronize"])]


@pytest.mark.parametrize("name", ["large", "zero1"])
def test_several_ranks_reduce_beside_the_backward_pass_and_wait_on_the_device(launches, name):
    assert launches[1][0](stops, name)["waits"] == []
    for rank in launches[2]:
        waits = rank(stops, name)["waits"]
        assert waits.count(("other", "compute")) > 1 and waits[-1] == ("compute", "other")


def test_a_recipe_with_deepspeeds_timer_is_told_once(fp16, caplog):
    told = []
    for blocks in ({}, {"timers": {"throughput": {"enabled": False}}}, {"timers": {"throughput": {"synchronized": False}}}):
        caplog.clear()
        with answering_as_gpu(HostStops()):
            make_engine(**blocks)
        told.append([record.getMessage() for record in caplog.records if "timer" in record.getMessage()])
    (message,), *others = told
    assert '"timers": {"throughput": {"enabled": false}}' in message and others == [[], []]
    caplog.clear()
    make_engine()
    assert "timer" not in caplog.text  # where it stops nothing


@pytest.mark.parametrize("written", [None, {"throughput": {"enabled": True}}])
def test_pretrain_times_its_own_steps(written):
    raw = {"train_batch_size": 8, "sctd": {}, "pretrain": {}, **({"timers": written} if written else {})}
    assert settings.load(raw).deepspeed["timers"] == (written or {"throughput": {"enabled": False}})


# DeepSpeed's numbers

UPDATES = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero1-fp32-sums": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-fp32-sums": {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16-fp32-sums": {
        "fp16": {"enabled": False},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
POISON = {
    2: ("bert.embeddings.word_embeddings.weight", torch.inf),
    4: ("bert.encoder.layer.2.attention.self.key.bias", torch.nan),
    5: ("cls.predictions.transform.LayerNorm.bias", -torch.inf),
}
"""In which steps (tried, not applied) which gradient gets which element, on the last rank."""


def tried_steps(engine, here, count):
    """Step by step: was it applied, loss scale, gradient norm; and the weights at the end."""
    parameters, batches = dict(engine.module.named_parameters()), micro_batches(engine, here.rank)
    history = []
    for number in range(count):
        name, value = POISON.get(number, (None, None))
        hook = None
        if name and here.rank == here.world - 1:
            hook = parameters[name].register_hook(lambda g, value=value: g.index_fill(0, torch.tensor([1]), value))
        engine.train_batch(batches)
        if hook:
            hook.remove()
        norm = engine.get_global_grad_norm()
        history.append((engine.was_step_applied(), engine._get_optimizer_loss_scale(), None if norm is None else float(norm)))
    return history, {name: p.detach().clone() for name, p in parameters.items()}


@scenario(cases=UPDATES)
def updates(here, name):
    """The same steps with our update and with DeepSpeed's."""
    allow_fp16()
    runs = {}
    for whose in ("ours", "deepspeed"):
        engine = make_engine(**UPDATES[name])
        kind = type(engine.optimizer).__name__
        if whose == "deepspeed":
            zero.uninstall(engine.optimizer)
        runs[whose] = tried_steps(engine, here, 9)
        runs[f"{whose} class"] = (kind, type(engine.optimizer).__name__)
    return runs


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_deepspeeds_bit_for_bit(rank, name):
    runs = rank(updates, name)
    (history, weights), (expected, expected_weights) = runs["ours"], runs["deepspeed"]
    assert history == expected
    assert [number for number, (applied, *_) in enumerate(history) if not applied] == sorted(POISON)
    assert all(torch.equal(weight, expected_weights[key]) for key, weight in weights.items())
    if name == "zero0":
        assert "ZeroOptimizer" not in "".join(runs["ours class"])
    else:
        assert runs["ours class"] == ("ZeroOptimizer", "ZeroOptimizer")
        assert runs["deepspeed class"] == ("ZeroOptimizer", "DeepSpeedZeroOptimizer")


# How many operations


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(dtype, ours=True):
    """Calls of the dispatcher for 24 layers: in the backward pass of a step's second micro-batch, and in the update."""
    model = small_bert(num_hidden_layers=24, hidden_size=8, intermediate_size=8, vocab_size=VOCABULARY)
    engine = make_engine(model, data_types={"grad_accum_dtype": dtype})
    assert len(list(model.parameters())) == 394
    if not ours:
        zero.uninstall(engine.optimizer)
    batches = micro_batches(engine)
    for _ in range(2 * ACCUMULATION):  # in the first update DeepSpeed links the optimizer's state, once
        loss = engine(**next(batches)).loss
        with Count() as backward:
            engine.backward(loss)
        with Count() as update:
            engine.step()
    assert engine.applied_steps == 2
    return backward.calls, update.calls


def test_an_update_of_394_parameters_is_few_operations(fp16):
    fp16_backward, fp16_update = operations("fp16")
    fp32_backward, fp32_update = operations("fp32")
    assert fp16_update < 500 and fp32_update < 100
    assert operations("fp32", ours=False)[1] > 5000
    assert fp32_backward < fp16_backward  # the same sums with one operation per parameter less


# Sums in fp32


@pytest.mark.parametrize(("dtype", "least", "most"), [("fp16", 2e-4, 5e-3), ("fp32", 0, 1e-6)])
def test_what_the_sum_of_32_micro_batches_loses(fp16, dtype, least, most):
    """Relative error of the update's gradient against the exact sum of what the backward passes gave."""
    count = 32
    blocks = {"train_batch_size": count, "gradient_accumulation_steps": count, "data_types": {"grad_accum_dtype": dtype}}
    engine = make_engine(**blocks)
    parameters, batches = list(engine.module.parameters()), micro_batches(engine)
    exact = {p: torch.zeros_like(p, dtype=torch.float64) for p in parameters}

    def add(gradient, parameter):
        exact[parameter] += gradient.double()

    for p in parameters:
        p.register_hook(partial(add, parameter=p))
    for call in range(count):
        engine.backward(engine(**next(batches)).loss)
        if call < count - 1:
            engine.step()
    (gradients,) = engine.optimizer.averaged_gradients.values()
    truth = torch.cat([exact[p].flatten() for p in parameters])
    result = torch.cat([g.flatten() for g in gradients])[: len(truth)].double()
    assert least <= (result - truth).norm() / truth.norm() <= most


@scenario
def resumed(here):
    """Sums in fp32: three more steps, with and without a stop before them."""
    allow_fp16()
    engines = [make_engine(data_types={"grad_accum_dtype": "fp32"}) for _ in range(2)]
    tried_steps(engines[0], here, 4)
    engines[0].save_checkpoint(str(here.folder / f"sums{here.world}"), tag="stopped")
    engines[1].load_checkpoint(str(here.folder / f"sums{here.world}"), tag="stopped")
    return [tried_steps(engine, here, 3) for engine in engines]


def test_sums_in_fp32_resume_exactly(rank):
    (history, weights), (expected, expected_weights) = rank(resumed)
    assert history == expected
    assert all(torch.equal(weight, expected_weights[key]) for key, weight in weights.items())


# A pipeline, after everything else: DeepSpeed refuses an engine without one after that.


@scenario(ranks=(2,))
def stops_of_a_pipeline(here):
    """What stops the host in steps of ds_configs/base_pipeline.json, on two stages and in one mode."""
    allow_fp16()
    host = HostStops()
    sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "pretrain.stages": 2}
    file = ROOT / "ds_configs" / "base_pipeline.json"
    blocks = settings.load(file, [f"{key}={value}" for key, value in sizes.items()], here.world).deepspeed
    model = small_bert(vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    with answering_as_gpu(host):
        engine = make_engine(Pipeline(model, sctd_ds.ScTDConfig(**METHOD), stages=2), **blocks)
        engine.forced_mode = "drop"
        batches = micro_batches(engine)
        engine.train_batch(batches)  # stages tell each other the shape of what they exchange
        with host:
            engine.train_batch(batches)
    return host.stops


def test_a_step_of_a_pipeline_stops_the_host_once(launches):
    assert [rank(stops_of_a_pipeline) for rank in launches[2]] == [["tolist"], ["tolist"]]


# Where it is not used


def test_a_deepspeed_without_a_method_that_is_replaced_keeps_its_own_update(fp16, monkeypatch, caplog):
    monkeypatch.setattr(zero, "_REPLACED", (*zero._REPLACED, "not_there"))
    with caplog.at_level(logging.WARNING):
        engine = make_engine()
    assert type(engine.optimizer) is DeepSpeedZeroOptimizer
    assert "has no not_there" in caplog.text
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    batches = micro_batches(engine)
    engine.train_batch(batches)
    assert any(not torch.equal(p, before[name]) for name, p in engine.module.named_parameters())


def test_a_step_that_nobody_agreed_on_is_deepspeeds(fp16):
    """As under DeepSpeed's own engine, which measurements compare with."""
    engine = make_engine()
    optimizer, batches = engine.optimizer, micro_batches(engine)
    for _ in range(ACCUMULATION):
        engine.backward(engine(**next(batches)).loss)
        engine.micro_steps += 1
    optimizer.averaged_gradients[0][0].fill_(torch.inf)
    optimizer.step()
    assert optimizer.overflow
