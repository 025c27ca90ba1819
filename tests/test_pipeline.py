"""The pipeline in real launches, 2 stages on 2 ranks and 2 replicas of 2 stages on 4: the same model, gradient and run."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import sctd_ds
from helpers.bert import small_bert, small_modernbert
from helpers.runs import STABLE_DECAY, STEPS, assert_same_end, continue_run, settings, train_whole_run, write_settings
from helpers.scenarios import run_scenarios, scenario
from sctd_ds import config, pretrain
from sctd_ds.engine import checkpoint, pipeline
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.engine.step import NonFiniteLossError
from sctd_ds.method.convert import state_of
from sctd_ds.method.flops import Shape, part_flops
from sctd_ds.method.schedule import mean_cost
from sctd_ds.run import job, metrics
from sctd_ds.run.validation import validate

LAYERS, ROWS, LENGTH, VOCABULARY, LABELS, STAGES = 8, 12, 16, 64, 3, 2
METHOD = {"interval": 3, "kl_weight": 5.0, "keep_token_ids": [1, 2, 3, 4], "labels_per_row": LABELS}
RATE = 0.02
SGD = {"type": "SGD", "params": {"lr": RATE}}
ADAM = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}
SAVED_AT = 4
"""Applied steps of every checkpoint here."""


@pytest.fixture(scope="module")
def launches(small_data, tmp_path_factory):
    """The scenarios of this file on two ranks and then on four: launches[world][rank] reads what they returned."""
    folder = tmp_path_factory.mktemp("pipeline")
    pretrain = {"stages": STAGES, "probe_steps": 1, "data": str(small_data)}
    write_settings(folder / "mini.json", zero_optimization={"stage": 1}, scheduler=STABLE_DECAY, pretrain=pretrain)
    return {world: run_scenarios(__name__, folder, ranks=world) for world in (2, 4)}


@pytest.fixture(
    params=[(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)],
    ids=["first-of-2", "second-of-2", "first-of-4", "second-of-4", "third-of-4", "fourth-of-4"],
)
def rank(request, launches):
    """Each rank of each launch in turn."""
    world, index = request.param
    return launches[world][index]


def make_model(build=small_bert, **method):
    sizes = {"hidden_size": 16, "num_hidden_layers": LAYERS, "intermediate_size": 32}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return sctd_ds.convert(build(**sizes, **limits, initializer_range=0.15), sctd_ds.ScTDConfig(**{**METHOD, **method}))


def initialize(model, optimizer, accumulation, **more):
    config = {
        "train_batch_size": ROWS,
        "gradient_accumulation_steps": accumulation,
        "optimizer": optimizer,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000000,
        **more,
    }
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def make_pipeline(boundary=None, optimizer=ADAM, accumulation=3, more=None, **method):
    boundaries = None if boundary is None else [boundary]
    model = Pipeline(make_model(**method), stages=STAGES, boundaries=boundaries)
    return initialize(model, optimizer, accumulation, **({"gradient_clipping": 1.0} if more is None else more))


def make_data_parallel():
    return initialize(make_model(), ADAM, 3, gradient_clipping=1.0, zero_optimization={"stage": 2})


def micro_batches(count, world=1, rank=0):
    """The same batches of ROWS rows for every split into `count` micro-batches; the second micro-batch has padded rows."""
    generator, m = torch.Generator().manual_seed(7), ROWS // (count * world)
    while True:
        ids = 5 + (torch.rand(ROWS, LENGTH, generator=generator) ** 4 * (VOCABULARY - 5)).long()
        labels = torch.full_like(ids, -100)
        places = torch.rand(ROWS, LENGTH - 6, generator=generator).argsort(1)[:, :LABELS]
        labels.scatter_(1, places, ids.gather(1, places))
        ids.scatter_(1, places, 4)
        mask = torch.ones_like(ids)
        mask[ROWS // 3 : ROWS // 2, -6:] = 0
        for j in range(count):
            rows = slice((j * world + rank) * m, (j * world + rank + 1) * m)
            batch = {"input_ids": ids[rows], "labels": labels[rows]}
            yield batch if mask[rows].all() else {**batch, "attention_mask": mask[rows]}


def own_batches(engine):
    """The micro-batches of this rank's pipeline, or of this data-parallel rank."""
    replica = engine.mpu.get_data_parallel_rank() if engine.mpu else dist.get_rank()
    return micro_batches(engine.gradient_accumulation_steps(), engine.dp_world_size, replica)


def weights(engine):
    """This stage's weights under the model's names."""
    return {n: p.detach().clone() for n, p in engine.module.plain_model.state_dict().items() if not p.is_meta}


def table(engine):
    return sctd_ds.importance(engine.module).scores.clone()


def train(engine, steps, start=0):
    """Losses of `steps` steps, on the batches from step `start` on."""
    batches = own_batches(engine)
    for _ in range(start * engine.gradient_accumulation_steps()):
        next(batches)
    return torch.tensor([engine.train_batch(batches) for _ in range(steps)])


def run_of(engine, losses, whole_validation):
    """What a run came to. Ranks that do not see the whole validation batch see its first two rows."""
    rows = slice(None) if whole_validation else slice(0, 2)
    batch = {key: value[rows] for key, value in next(micro_batches(1)).items()}
    return {
        "losses": losses,
        "scores": table(engine),
        "validation": validate(engine, [batch, batch]),
        "norm": float(engine.get_global_grad_norm()),
    }


def run_steps(world):
    """Steps of the long runs; fewer with replicas."""
    return 40 if world == STAGES else 12


# Data parallel comes first: DeepSpeed keeps the grid of the last pipeline, and refuses an engine without one after that.


@scenario
def data_parallel(here):
    """ZeRO-2 on all ranks, with a checkpoint on the way."""
    engine = make_data_parallel()
    losses = train(engine, SAVED_AT)
    engine.save_checkpoint(str(here.folder / f"data_parallel{here.world}"), client_state={"position": SAVED_AT * ROWS})
    losses = torch.cat([losses, train(engine, run_steps(here.world) - SAVED_AT, start=SAVED_AT)])
    return run_of(engine, losses, whole_validation=here.rank % (here.world // STAGES) == 0)


@scenario(ranks=(4,))
def data_parallel_from_a_pipeline(here):
    """ZeRO-2 on four ranks, from the checkpoint that the launch with two ranks saved in `reloaded`."""
    engine = make_data_parallel()
    position = checkpoint.restore(engine, here.folder / "pipeline2" / f"global_step{SAVED_AT}")
    return {"position": position, "losses": train(engine, 4, start=SAVED_AT)}


# Against the model without pipeline and without DeepSpeed

# Of 8 layers, counted from 0: 0-2 full, 3 cross, 4-6 kept, 7 last.
ON_ALL = {
    "in_full": {"boundary": 2},
    "spread_5": {"boundary": 5, "align_schedule": "spread", "interval": 2},
}
ON_TWO = {  # replicas bring nothing new to these
    "before_cross": {"boundary": 3},
    "after_cross": {"boundary": 4},
    "in_kept": {"boundary": 5},
    "before_last": {"boundary": 7},
    "spread_2": {"boundary": 2, "align_schedule": "spread", "interval": 2},
    "two_prefixes": {"boundary": 2, "shared_prefix": False},
    "recomputed": {"boundary": 5, "recompute_align": True},
    "dense": {"boundary": 4, "method": "dense"},
    "modernbert": {"boundary": 4, "build": small_modernbert},
    "documents": {"boundary": 4, "document_mask": 7},  # a frequent id
}


@scenario(cases=ON_ALL)
def beside_the_plain_model(here, name):
    return against_plain_model(**ON_ALL[name])


@scenario(cases=ON_TWO, ranks=(2,))
def beside_the_plain_model_on_two(here, name):
    return against_plain_model(**ON_TWO[name])


def against_plain_model(boundary, **method):
    """Steps of plain SGD, in the pipeline and in the model alone, in every mode: the largest differences."""
    modes = ["dense"] * 3 if method.get("method") == "dense" else ["drop", "align", "drop", "dense"]
    engine = make_pipeline(boundary, SGD, more={"gradient_clipping": 0.0}, **method)
    count = engine.gradient_accumulation_steps() * engine.dp_world_size
    plain = make_model(**method).train()
    pipelines, plain_models = own_batches(engine), micro_batches(count)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    loss_gap = weight_gap = moved = 0.0
    for step, mode in enumerate(modes, 1):
        engine.forced_mode = mode
        loss = engine.train_batch(pipelines)
        plain.zero_grad()
        sctd_ds.set_mode(plain, mode, step)
        total = sum(plain(**next(plain_models)).loss for _ in range(count)) / count
        total.backward()
        sctd_ds.importance(plain).update(alone)
        loss_gap = max(loss_gap, abs(loss - total.item()))
        expected = dict(plain.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            moved = max(moved, *(RATE * p.grad.abs().max().item() for p in plain.parameters()))
            for p in plain.parameters():
                p -= RATE * p.grad
            weight_gap = max(weight_gap, *((w - expected[n]).abs().max().item() for n, w in weights(engine).items()))
    same_scores = torch.allclose(table(engine), sctd_ds.importance(plain).scores, rtol=1e-5)
    return {"loss_gap": loss_gap, "weight_gap": weight_gap, "moved": moved, "scores_same": same_scores}


def test_losses_gradients_and_table_are_the_plain_models(rank):
    """Drop, align and dense steps in turn, with padded rows, whatever region the boundary lies in."""
    cases = [(beside_the_plain_model, name) for name in ON_ALL]
    if rank.world == 2:
        cases += [(beside_the_plain_model_on_two, name) for name in ON_TWO]
    for case in cases:
        gaps = rank(*case)
        assert gaps["moved"] > 1e-2, case
        assert gaps["loss_gap"] < 1e-5, (case, gaps)
        assert gaps["weight_gap"] < 1e-5 * gaps["moved"] + 1e-6, (case, gaps)
        assert gaps["scores_same"], case


# Runs beside those of the ZeRO engine


@scenario
def pipelined(here):
    engine = make_pipeline()
    losses = train(engine, run_steps(here.world))
    exported = here.folder / f"exported{here.world}"
    run = run_of(engine, losses, whole_validation=engine.mpu.get_data_parallel_rank() == 0)
    sctd_ds.export(engine, exported)
    return {**run, "weights": weights(engine), "exported": str(exported)}


def test_forty_steps_are_those_of_the_zero_engine(rank):
    """Twelve with replicas."""
    pipeline, other = rank(pipelined), rank(data_parallel)
    assert len(pipeline["losses"]) == (40 if rank.world == 2 else 12)
    assert pipeline["losses"][-1] < pipeline["losses"][0] - 0.2
    torch.testing.assert_close(pipeline["losses"], other["losses"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipeline["scores"], other["scores"], rtol=1e-4, atol=1e-4)
    assert pipeline["norm"] == pytest.approx(other["norm"], rel=1e-3)
    assert pipeline["validation"] == pytest.approx(other["validation"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_table_and_losses_are_the_same_on_all_stages_and_replicas(launches, world):
    first, *others = (rank(pipelined) for rank in launches[world])
    assert not torch.equal(first["scores"], torch.full_like(first["scores"], 10.0))
    for other in others:
        assert torch.equal(other["scores"], first["scores"])
        assert torch.equal(other["losses"], first["losses"])


@pytest.mark.parametrize("world", [2, 4])
def test_stages_hold_their_own_weights_and_share_the_embedding(launches, world):
    first, last = (launches[world][index](pipelined)["weights"] for index in (0, -1))
    assert not first.keys() & last.keys()
    assert any(".layer.0." in name for name in first) and any(".layer.7." in name for name in last)
    assert torch.equal(first["bert.embeddings.word_embeddings.weight"], last["cls.predictions.decoder.weight"])


@pytest.mark.parametrize("world", [2, 4])
def test_export_is_a_plain_hugging_face_model(launches, world):
    first, last = (launches[world][index](pipelined) for index in (0, -1))
    model = AutoModelForMaskedLM.from_pretrained(first["exported"]).state_dict()
    for stage in (first, last):
        for name, weight in stage["weights"].items():
            assert torch.equal(model[name], weight), name


OTHER_RUNS = {"random": {"importance": "random"}, "bf16": {"more": {"bf16": {"enabled": True}, "gradient_clipping": 1.0}}}


@scenario(cases=OTHER_RUNS, ranks=(2,))
def pipelined_otherwise(here, name):
    return train(make_pipeline(**OTHER_RUNS[name]), 12)


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_bf16_and_other_policies_learn(launches, name):
    for rank in launches[2]:
        losses = rank(pipelined_otherwise, name)
        assert torch.isfinite(losses).all() and losses[-3:].mean() < losses[:3].mean() - 0.2


# What stops a run, and what is refused


@scenario
def poisoned(here):
    """A NaN in the head, in the second step."""
    engine = make_pipeline()
    batches = own_batches(engine)
    engine.train_batch(batches)
    before = weights(engine)
    if engine.module.head is not None:
        transform = engine.module.plain_model.cls.predictions.transform
        transform.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(NonFiniteLossError) as raised:
        engine.train_batch(batches)
    same = all(torch.equal(before[name], value) for name, value in weights(engine).items())
    return {"step": raised.value.step, "here": bool(raised.value.here), "weights_same": same}


def test_nan_on_the_last_stage_stops_all_before_the_update(rank):
    on_last_stage = rank.index >= rank.world // STAGES
    assert rank(poisoned) == {"step": 2, "here": on_last_stage, "weights_same": True}


@scenario(ranks=(2,))
def refusals(here):
    """The messages for what cannot work."""
    built = Pipeline(make_model(), stages=STAGES)
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    attempts = {
        "stages": lambda: Pipeline(make_model(), stages=LAYERS + 1),
        "boundaries": lambda: Pipeline(make_model(), stages=STAGES, boundaries=[LAYERS]),
        "zero": lambda: make_pipeline(more={"zero_optimization": {"stage": 0}}),
        "block": lambda: initialize(built, ADAM, 1, sctd={"interval": 7}),
        "family": lambda: Pipeline(RobertaForMaskedLM(RobertaConfig(**sizes)), stages=STAGES),
    }
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(sctd_ds.ConfigError) as raised:
            attempt()
        messages[name] = str(raised.value)
    engine = make_pipeline(accumulation=2)
    batch = next(own_batches(engine))
    with pytest.raises(ValueError) as raised:
        engine.train_batch({key: value[:, :length] for key, value in batch.items()} for length in (LENGTH, LENGTH // 2))
    return {**messages, "shapes": str(raised.value)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stages", "9 pipeline stages, but the model has 8 encoder layers"),
        ("boundaries", "boundaries=[8]: expected 1 encoder layers from 1 to 7, ascending"),
        ("zero", "zero_optimization.stage=0 with a pipeline"),
        ("block", "sctd.interval=7, but the pipeline was built with 3"),
        ("family", "not from RobertaForMaskedLM"),
        ("shapes", "must have one shape"),
    ],
)
def test_what_cannot_work_is_named_by_the_engine(launches, name, words):
    for rank in launches[2]:
        assert words in rank(refusals)[name]


# Checkpoints


@scenario
def reloaded(here):
    """A pipeline that continues after its checkpoint, beside a new one that loads it."""
    engine, folder = make_pipeline(), str(here.folder / f"pipeline{here.world}")
    train(engine, SAVED_AT)
    engine.save_checkpoint(folder, client_state={"position": SAVED_AT * ROWS})
    losses = train(engine, 4, start=SAVED_AT)
    other = make_pipeline()
    _, client = other.load_checkpoint(folder)
    return {
        "position": client["position"],
        "applied": other.applied_steps,
        "losses": torch.equal(train(other, 4, start=SAVED_AT), losses),
        "weights": all(map(torch.equal, weights(engine).values(), weights(other).values())),
        "scores": torch.equal(table(engine), table(other)),
    }


@scenario
def pipelined_from_data_parallel(here):
    """A pipeline from the checkpoint of `data_parallel`."""
    engine = make_pipeline()
    position = checkpoint.restore(engine, here.folder / f"data_parallel{here.world}" / f"global_step{SAVED_AT}")
    return {"position": position, "losses": train(engine, 4, start=SAVED_AT)}


def test_checkpoint_continues_exactly(rank):
    assert rank(reloaded) == {"position": 48, "applied": 4, "losses": True, "weights": True, "scores": True}


def test_either_engine_continues_from_the_others_checkpoint(rank):
    """ZeRO-2 shards of 2 or 4 ranks into a pipeline, and a pipeline's shards into ZeRO-2 of 4 ranks, after step 4."""
    expected = rank(data_parallel)["losses"][SAVED_AT : SAVED_AT + 4]
    crossings = (
        [pipelined_from_data_parallel] if rank.world == 2 else [pipelined_from_data_parallel, data_parallel_from_a_pipeline]
    )
    for crossing in crossings:
        assert rank(crossing)["position"] == 48
        torch.testing.assert_close(rank(crossing)["losses"], expected, rtol=1e-5, atol=1e-5)


# pretrain.py over two stages. These come last: what the main job sets up in its process stays there.


@scenario(ranks=(2,))
def whole_job(here):
    """A run that never stops."""
    train_whole_run(here.folder / "mini.json", here.folder / "whole")
    return str(here.folder / "whole")


@scenario(ranks=(2,))
def resumed_job(here):
    """The same run from a checkpoint just before an align step."""
    continue_run(here.folder / "mini.json", here.folder / "whole", here.folder / "resumed", step=3)
    return str(here.folder / "resumed")


@pytest.fixture
def whole(launches):
    """The folder of the run that never stops."""
    return Path(launches[2][0](whole_job))


def test_resumed_job_is_the_job_that_never_stopped(launches, whole):
    assert_same_end(whole, Path(launches[2][0](resumed_job)))


def test_job_reports_every_mode_the_bubble_and_both_passes(whole):
    report = json.loads((whole / "report.json").read_text())
    assert (report["ranks"], report["stages"], report["micro_batches"]) == (2, 2, 2)
    assert set(report["step_ms"]) == set(report["bubble_share"]) == {"dense", "drop", "align"}
    assert all(0 < share < 1 for share in report["bubble_share"].values())
    assert report["validation"]["gap"] == pytest.approx(report["validation"]["loss_drop"] - report["validation"]["loss_full"])
    train = [r for r in metrics.read(whole / "metrics.jsonl") if r["event"] == "train"]
    assert all(("kl_last" in r) == (r["mode"] == "align") and r["grad_norm"] > 0 for r in train) and len(train) == STEPS


def test_data_parallel_job_starts_from_a_pipelines_checkpoint(whole, small_data, tmp_path, capsys):
    checkpoint = whole / "checkpoints" / "step_00000004"

    def start(name, *more, **changes):
        file = write_settings(tmp_path / "mini.json", scheduler=STABLE_DECAY, **changes)
        arguments = ["--deepspeed_config", file, "--data", small_data, "--output", tmp_path / name, "--start-from", checkpoint]
        return pretrain.run_and_report([str(a) for a in (*arguments, *more)])

    assert start("other", sctd={"interval": 5}) == 2
    assert "sctd.interval: 4 -> 5" in capsys.readouterr().err
    assert start("run") == 0
    started, piped = (metrics.read(run / "metrics.jsonl") for run in (tmp_path / "run", whole))
    started, piped = ([r for r in records if r["event"] == "train"] for records in (started, piped))
    assert [(r["step"], r["mode"], r["lr"]) for r in started] == [(r["step"], r["mode"], r["lr"]) for r in piped[4:]]
    # Dropout draws other masks, which moves a loss by less than four steps of learning do.
    assert abs(started[0]["loss"] - piped[4]["loss"]) < 0.5 * abs(piped[4]["loss"] - piped[0]["loss"])
    (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"")
    assert start("damaged") == 2
    assert "mp_rank_00_model_states.pt has 0 bytes" in capsys.readouterr().err


# Without a launch


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ({"pretrain": {"stages": 5}}, 5, "5 pipeline stages, but the model has 4 encoder layers"),
        ({"pretrain": {"stages": 2}}, 3, "3 ranks cannot form pipelines of 2 stages"),
        ({"zero_optimization": {"stage": 2}}, 2, "zero_optimization.stage=2 with a pipeline"),
        ({"zero_optimization": {"stage": 0}}, 2, "clips by the gradients of the first stage alone"),
        ({"pipeline": {"activation_checkpoint_interval": 1}}, 2, "activation_checkpoint_interval"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_built(change, ranks, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        job.load(settings(**{"zero_optimization": {"stage": 1}, "pretrain": {"stages": 2}, **change}), world_size=ranks)


def test_ranks_are_stages_times_replicas():
    run = job.load(settings(zero_optimization={"stage": 1}, pretrain={"stages": 2}), world_size=4)
    assert (run.ranks, run.world_size, run.micro_batch, run.global_batch) == (4, 2, 2, 8)


@pytest.mark.parametrize("method", ["sctd", "token_drop", "dense"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_are_as_even_in_operations_as_can_be(method, stages):
    sizes = BertConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=12, num_attention_heads=2, intermediate_size=256)
    model = BertForMaskedLM(sizes)
    sctd_ds.convert(model, sctd_ds.ScTDConfig(method=method, labels_per_row=20, keep_token_ids=[1]))
    state = state_of(model)
    shape = Shape(12, 64, 256, 2000, 128, 20)
    modes = ("dense",) if method == "dense" else ("dense", "drop", "align")
    cost = [
        mean_cost(state.config, dict(zip(modes, flops, strict=True)))
        for flops in zip(*(part_flops(shape, state.config, mode) for mode in modes), strict=True)
    ]

    def costliest(boundaries):
        ends = (0, *boundaries, 12)
        return max(sum(cost[a:b]) + (cost[12] if b == 12 else 0) for a, b in itertools.pairwise(ends))

    chosen = pipeline.balance(state, sizes, stages, 128)
    assert len(chosen) == stages - 1
    assert costliest(chosen) == pytest.approx(min(map(costliest, itertools.combinations(range(1, 12), stages - 1))))
