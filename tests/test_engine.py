"""The engine in real launches with one and two ranks: schedule, ZeRO stages, table, overflow, NaN, checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForMaskedLM

import sctd_ds
from helpers.bert import small_bert
from helpers.scenarios import run_scenarios, scenario
from sctd_ds.engine import ranks
from sctd_ds.engine.checkpoint import _placed
from sctd_ds.engine.step import NonFiniteLossError
from sctd_ds.integrations.export import full_precision_state

STEPS, BATCH, LENGTH, VOCABULARY = 7, 8, 16, 64
MODES = ["drop", "drop", "align", "drop", "drop", "align", "drop"]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """The scenarios of this file on one rank and on two: launches[world][rank] reads what they returned."""
    folder = tmp_path_factory.mktemp("engine")
    return {world: run_scenarios(__name__, folder, ranks=world) for world in (1, 2)}


@pytest.fixture(params=[(1, 0), (2, 0), (2, 1)], ids=["one-rank", "first-of-two", "second-of-two"])
def rank(request, launches):
    """Each rank of each launch in turn."""
    world, index = request.param
    return launches[world][index]


def make_engine(*, accumulation=2, zero=2, bf16=False, fp16=None, **method):
    """A tiny model in the engine. fp16: exponent of the first loss scale."""
    model = small_bert(vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    settings = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "sctd": {"interval": 3, "keep_token_ids": [1, 2, 3, 4], "labels_per_row": 3, **method},
    }
    if bf16:
        settings["bf16"] = {"enabled": True}
    if fp16 is not None:
        # torch computes in fp16 on a CPU, too; DeepSpeed does not offer it there because it is slow.
        accelerator = get_accelerator()
        accelerator.is_fp16_supported = lambda: True
        accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.half]
        settings["fp16"] = {"enabled": True, "initial_scale_power": fp16}
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def micro_batches(engine, here):
    """The same global batches for every split: micro-batch j of rank r is rows [(j * world + r) * m, ... + m)."""
    generator = torch.Generator().manual_seed(7)
    m = engine.train_micro_batch_size_per_gpu()
    while True:
        # A skewed language: something to learn in a few steps.
        ids = 5 + (torch.rand(BATCH, LENGTH, generator=generator) ** 4 * (VOCABULARY - 5)).long()
        labels = torch.full_like(ids, -100)
        places = torch.rand(BATCH, LENGTH, generator=generator).argsort(1)[:, :3]
        labels.scatter_(1, places, ids.gather(1, places))
        ids.scatter_(1, places, 4)
        for j in range(engine.gradient_accumulation_steps()):
            rows = slice((j * here.world + here.rank) * m, (j * here.world + here.rank + 1) * m)
            yield {"input_ids": ids[rows], "labels": labels[rows]}


def weights(engine):
    return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def same_weights(engine, before):
    return all(torch.equal(p.float(), before[name]) for name, p in engine.module.named_parameters())


def table(engine):
    return sctd_ds.importance(engine.module).scores.clone()


def train(engine, here, steps=STEPS):
    """Steps on the batches from the first on, and what they did."""
    batches = micro_batches(engine, here)
    modes, losses = [], []
    for _ in range(steps):
        modes.append(engine.step_mode)
        losses.append(engine.train_batch(batches))
    return {"modes": modes, "losses": torch.tensor(losses), "scores": table(engine), "weights": weights(engine)}


def assert_same_run(one, other, tolerance):
    assert one["modes"] == other["modes"]
    torch.testing.assert_close(one["losses"], other["losses"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one["scores"], other["scores"], rtol=tolerance, atol=tolerance)


# Plain training in several ways

RUNS = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "accumulation1": {"accumulation": 1},
    "accumulation4": {"accumulation": 4},
    "spread": {"align_schedule": "spread"},
    "random": {"importance": "random"},
    "frequency": {"importance": "frequency"},
    "dense": {"method": "dense"},
    "bf16": {"bf16": True},
}


@scenario(cases=RUNS)
def trained(here, name):
    return train(make_engine(**RUNS[name]), here)


def test_schedule_counts_optimizer_steps_and_not_micro_batches(rank):
    for name in ("zero0", "zero1", "zero2", "accumulation1", "accumulation4", "bf16"):
        assert rank(trained, name)["modes"] == MODES, name
    assert set(rank(trained, "spread")["modes"]) == {"align"}
    assert set(rank(trained, "dense")["modes"]) == {"dense"}


def test_zero_stages_agree(rank):
    for stage in ("zero1", "zero2"):
        assert_same_run(rank(trained, "zero0"), rank(trained, stage), 1e-5)


@pytest.mark.parametrize("name", ["zero2", "frequency", "accumulation4", "spread"])
def test_table_is_the_same_on_ranks_bit_for_bit(launches, name):
    first, second = (rank(trained, name)["scores"] for rank in launches[2])
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.full_like(first, 10.0))


def test_table_and_losses_do_not_depend_on_world_size_or_accumulation(launches):
    alone, first_of_two = launches[1][0], launches[2][0]
    for name in ("accumulation1", "accumulation4"):
        assert_same_run(alone(trained, "zero2"), alone(trained, name), 1e-4)
    assert_same_run(alone(trained, "zero2"), first_of_two(trained, "zero2"), 1e-4)


def test_training_lowers_the_loss_and_keeps_the_table_in_fp32(rank):
    for name in ("zero2", "bf16", "spread", "random", "frequency", "dense"):
        run = rank(trained, name)
        assert torch.isfinite(run["losses"]).all() and run["losses"][-2:].mean() < run["losses"][:2].mean(), name
        assert run["scores"].dtype == torch.float32


@scenario
def recipes_own_loop(here):
    """Forward, backward, step, as the training script of a recipe calls them; returns the weights."""
    engine = make_engine()
    batches = micro_batches(engine, here)
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        output = engine(**next(batches))
        engine.backward(output.loss)
        engine.step()
    return weights(engine)


def test_a_recipes_own_loop_is_train_batch(rank):
    expected = rank(trained, "zero2")["weights"]
    for name, weight in rank(recipes_own_loop).items():
        assert torch.equal(weight, expected[name]), name


# Steps that are not applied


@scenario
def overflow(here):
    """A step whose gradients overflow, as the fp16 optimizer reports it, and the next one."""
    engine = make_engine()
    optimizer, batches = engine.optimizer, micro_batches(engine, here)
    for _ in range(2):
        engine.train_batch(batches)
    weights_before, table_before = weights(engine), table(engine)
    engine.eval()  # train_batch is for training, whatever came before
    step, optimizer.step = optimizer.step, lambda: setattr(optimizer, "overflow", True)
    mode = engine.step_mode
    engine.train_batch(batches)
    result = {
        "applied": engine.applied_steps,
        "mode": mode,
        "mode_after": engine.step_mode,
        "weights_same": same_weights(engine, weights_before),
        "scores_same": torch.equal(table(engine), table_before),
    }
    optimizer.step = step
    engine.train_batch(batches)
    return {**result, "applied_after": engine.applied_steps}


def test_overflowed_step_changes_nothing_and_is_not_counted(rank):
    assert rank(overflow) == {
        "applied": 2,
        "mode": "align",
        "mode_after": "align",
        "weights_same": True,
        "scores_same": True,
        "applied_after": 3,
    }


@scenario
def fp16(here):
    """fp16 with a loss scale that is far too high at first; then three steps, with and without a stop before them."""
    engine = make_engine(fp16=28)
    batches = micro_batches(engine, here)
    before = weights(engine)
    engine.train_batch(batches)
    first = {
        "skipped": engine.skipped_steps,
        "applied": engine.applied_steps,
        "weights_same": same_weights(engine, before),
        "scores_same": bool((table(engine)[5:] == 10).all()),
    }
    tried, losses = [], []
    while engine.applied_steps < STEPS and len(tried) < 40:
        tried.append((engine.applied_steps, engine.step_mode))
        losses.append(engine.train_batch(batches))
    folder = str(here.folder / f"fp16_{here.world}")
    engine.save_checkpoint(folder, tag="fp16")
    other = make_engine(fp16=28)
    other.load_checkpoint(folder, tag="fp16")
    return {
        "first": first,
        "tried": tried,
        "losses": losses,
        "scales": [each._get_optimizer_loss_scale() for each in (engine, other)],
        "continued": train(engine, here, 3),
        "resumed": train(other, here, 3),
    }


def test_fp16_skips_steps_until_the_loss_scale_fits_and_resumes_exactly(rank):
    run = rank(fp16)
    assert run["first"] == {"skipped": 1, "applied": 0, "weights_same": True, "scores_same": True}
    # Every step of the schedule is tried until it is applied, and only then the next.
    applied = [step for step, _ in run["tried"]]
    assert sorted(set(applied)) == list(range(len(MODES))) and applied == sorted(applied) and len(applied) > len(MODES)
    assert all(mode == MODES[step] for step, mode in run["tried"])
    assert run["losses"][-1] < run["losses"][0]
    scale, restored = run["scales"]
    assert restored == scale < 2**28
    continued, resumed = run["continued"], run["resumed"]
    assert continued["modes"] == resumed["modes"] and resumed["scores"].dtype == torch.float32
    for name in ("losses", "scores"):
        assert torch.equal(continued[name], resumed[name]), name
    assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in continued["weights"].items())


@scenario
def poisoned(here):
    """A NaN in the second step, on the last rank only."""
    engine = make_engine()
    batches = micro_batches(engine, here)
    engine.train_batch(batches)
    before = weights(engine)
    if here.rank == here.world - 1:
        norm = engine.module.cls.predictions.transform.LayerNorm
        norm.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(NonFiniteLossError) as raised:
        engine.train_batch(batches)
    return {
        "step": raised.value.step,
        "parts": raised.value.here,
        "weights_same": same_weights(engine, before),
        "scores_finite": bool(torch.isfinite(table(engine)).all()),
    }


def test_nan_on_one_rank_stops_all_before_the_update(rank):
    poisoned_parts = ["ce_drop", "loss"] if rank.index == rank.world - 1 else []
    assert rank(poisoned) == {"step": 2, "parts": poisoned_parts, "weights_same": True, "scores_finite": True}


# Checkpoints and exports


@scenario
def reloaded(here):
    """A checkpoint after four steps, loaded into a new engine, which is exported."""
    engine, folder = make_engine(), str(here.folder / f"checkpoint{here.world}")
    train(engine, here, 4)
    engine.save_checkpoint(folder, client_state={"mine": 5})
    other = make_engine()
    path, client = other.load_checkpoint(folder)
    exported = here.folder / f"exported{here.world}"
    sctd_ds.export(other, exported)
    return {
        "client": client,
        "applied": other.applied_steps,
        "found": bool(path),
        "scores_same": torch.equal(table(other), table(engine)),
        "mode": other.step_mode,
        "exported": str(exported),
    }


def test_checkpoint_restores_table_schedule_and_client_state(rank):
    result = rank(reloaded)
    assert result["found"] and result["scores_same"]
    assert (result["applied"], result["mode"]) == (4, "drop")
    assert result["client"]["mine"] == 5 and "sctd" not in result["client"]


def test_export_is_a_plain_hugging_face_model(launches):
    one, two = (AutoModelForMaskedLM.from_pretrained(launches[world][0](reloaded)["exported"]) for world in (1, 2))
    assert next(one.parameters()).dtype == torch.float32
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@scenario
def master_weights(here):
    """What an export takes from a bf16 run, beside the model's own weights."""
    engine = make_engine(bf16=True)
    train(engine, here, 2)
    return {"exported": full_precision_state(engine), "model": engine.module.state_dict()}


def test_export_takes_the_fp32_weights_of_a_16_bit_run(rank):
    exported, model = (rank(master_weights)[key] for key in ("exported", "model"))
    assert all(value.dtype == torch.float32 for value in exported.values())
    assert all(torch.equal(exported[name].bfloat16(), weight) for name, weight in model.items())
    assert any(not torch.equal(exported[name], weight.float()) for name, weight in model.items())


# Without a launch


def test_every_rank_works_on_its_own_device_from_the_start(monkeypatch):
    """DeepSpeed sets it in its engine only, and ranks talk before there is one."""
    chosen = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", set_device=chosen.append)
    monkeypatch.setattr(ranks, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(ranks.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks.init_distributed()
    assert chosen == [3]


@pytest.mark.parametrize(("group", "device"), [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")])
def test_a_step_count_is_put_where_its_optimizer_reads_it(group, device):
    placed = _placed({"step": torch.tensor(3.0)}, group, torch.device("meta"))
    assert placed["step"].device.type == device
