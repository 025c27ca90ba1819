"""The pipeline in real launches, 2 stages on 2 ranks and 2 replicas of 2 stages on 4: the same model, gradient and run."""

import itertools
import json
import re

import pytest
import torch
from conftest import ROOT, launch, settings, write_settings
from test_pretrain import assert_same_end
from transformers import BertConfig, BertForMaskedLM

import pretrain
import sctd_ds
from sctd_ds import config
from sctd_ds.engine import pipeline
from sctd_ds.method.convert import state_of
from sctd_ds.method.flops import Shape, part_flops
from sctd_ds.method.schedule import mean_cost
from sctd_ds.run import job, metrics

REPLICATED = ["in_full", "spread_5"]
SINGLE = ["before_cross", "after_cross", "in_kept", "before_last", "spread_2", "two_prefixes", "recomputed", "dense"]
RANKS = [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    loaded = {"folder": folder}
    for world in (2, 4):
        done = launch(ROOT / "tests" / "pipeline_scenarios.py", folder, ranks=world)
        assert done.returncode == 0, done.stdout[-3000:]
        for rank in range(world):
            loaded[world, rank] = torch.load(folder / f"world{world}_rank{rank}.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("rank", RANKS)
def test_losses_gradients_and_table_are_the_plain_models(results, rank):
    """Drop, align and dense steps in turn, with padded rows, whatever region the boundary lies in."""
    for name in REPLICATED + (SINGLE if rank[0] == 2 else []):
        case = results[rank][name]
        assert case["moved"] > 1e-2, name
        assert case["loss_gap"] < 1e-5 and case["weight_gap"] < 1e-5 * case["moved"] + 1e-6 and case["scores_same"], (
            name,
            case,
        )


@pytest.mark.parametrize("rank", RANKS)
def test_forty_steps_are_those_of_the_zero_engine(results, rank):
    """Twelve with replicas."""
    pipeline, other = results[rank]["run"], results[rank]["data_parallel"]
    assert len(pipeline["losses"]) == (40 if rank[0] == 2 else 12) and pipeline["losses"][-1] < pipeline["losses"][0] - 0.2
    torch.testing.assert_close(pipeline["losses"], other["losses"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipeline["scores"], other["scores"], rtol=1e-4, atol=1e-4)
    assert pipeline["norm"] == pytest.approx(other["norm"], rel=1e-3)
    assert pipeline["validation"] == pytest.approx(other["validation"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_table_and_losses_are_the_same_on_all_stages_and_replicas(results, world):
    first = results[world, 0]["run"]
    assert not torch.equal(first["scores"], torch.full_like(first["scores"], 10.0))
    for rank in range(1, world):
        assert torch.equal(results[world, rank]["run"]["scores"], first["scores"])
        assert torch.equal(results[world, rank]["run"]["losses"], first["losses"])


@pytest.mark.parametrize("world", [2, 4])
def test_stages_hold_their_own_weights_and_share_the_embedding(results, world):
    first, last = (results[world, rank]["run"]["weights"] for rank in (0, world - 1))
    assert not first.keys() & last.keys()
    assert any(".layer.0." in name for name in first) and any(".layer.7." in name for name in last)
    assert torch.equal(first["bert.embeddings.word_embeddings.weight"], last["cls.predictions.decoder.weight"])


@pytest.mark.parametrize("world", [2, 4])
def test_export_is_a_plain_hugging_face_model(results, world):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(results["folder"] / f"exported{world}").state_dict()
    for rank in (0, world - 1):
        for name, weight in results[world, rank]["run"]["weights"].items():
            assert torch.equal(model[name], weight), name


@pytest.mark.parametrize("rank", RANKS[:2])
def test_bf16_and_other_policies_learn(results, rank):
    for name in ("random", "bf16"):
        losses = results[rank][name]
        assert torch.isfinite(losses).all() and losses[-3:].mean() < losses[:3].mean() - 0.2, name


@pytest.mark.parametrize("rank", RANKS)
def test_nan_on_the_last_stage_stops_all_before_the_update(results, rank):
    assert results[rank]["poisoned"] == {"step": 2, "here": rank[1] >= rank[0] // 2, "weights_same": True}


@pytest.mark.parametrize("rank", RANKS)
def test_checkpoint_continues_exactly(results, rank):
    assert results[rank]["loaded"] == {"position": 48, "applied": 4, "losses": True, "weights": True, "scores": True}


@pytest.mark.parametrize("rank", RANKS)
def test_either_engine_goes_on_from_the_others_checkpoint(results, rank):
    """ZeRO-2 shards of 2 or 4 ranks into a pipeline, and a pipeline's shards into ZeRO-2 of 4 ranks, after step 4."""
    expected = results[rank]["data_parallel"]["losses"][4:8]
    for name in ("from_data_parallel", *(["from_pipeline"] if rank[0] == 4 else [])):
        assert results[rank][name]["position"] == 48
        torch.testing.assert_close(results[rank][name]["losses"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS[:2])
def test_what_cannot_work_is_named_by_the_engine(results, rank):
    said = results[rank]["errors"]
    for name, words in {
        "stages": "9 pipeline stages, but the model has 8 encoder layers",
        "boundaries": "boundaries=[8]: expected 1 encoder layers from 1 to 7, ascending",
        "zero": "zero_optimization.stage=0 with a pipeline",
        "block": "sctd.interval=7, but the pipeline was built with 3",
        "family": "not from RobertaForMaskedLM",
        "shapes": "must have one shape",
    }.items():
        assert words in said[name]


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


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """pretrain.py over two stages: a run that never stops, and one that continues from a checkpoint before an align step."""
    folder = tmp_path_factory.mktemp("job")
    file = write_settings(folder / "mini.json", zero_optimization={"stage": 1}, pretrain={"stages": 2, "probe_steps": 1})
    done = launch(ROOT / "tests" / "resume_scenarios.py", file, small_data, folder, 3, ranks=2)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def test_resumed_job_is_the_job_that_never_stopped(finished):
    assert_same_end(finished / "whole", finished / "from_3")


def test_job_reports_kinds_of_steps_bubble_and_both_passes(finished):
    report = json.loads((finished / "whole" / "report.json").read_text())
    assert (report["ranks"], report["stages"], report["micro_batches"]) == (2, 2, 2)
    assert set(report["step_ms"]) == set(report["bubble_share"]) == {"dense", "drop", "align"}
    assert all(0 < share < 1 for share in report["bubble_share"].values())
    assert report["validation"]["gap"] == pytest.approx(report["validation"]["loss_drop"] - report["validation"]["loss_full"])
    train = [r for r in metrics.read(finished / "whole" / "metrics.jsonl") if r["event"] == "train"]
    assert all(("kl_last" in r) == (r["mode"] == "align") and r["grad_norm"] > 0 for r in train) and len(train) == 14


def test_data_parallel_job_starts_from_a_pipelines_checkpoint(finished, small_data, tmp_path, capsys):
    checkpoint = finished / "whole" / "checkpoints" / "step_00000004"

    def start(name, *more, **changes):
        file = write_settings(tmp_path / "mini.json", **changes)
        arguments = ["--deepspeed_config", file, "--data", small_data, "--output", tmp_path / name, "--start-from", checkpoint]
        return pretrain.run_and_report([str(a) for a in (*arguments, *more)])

    assert start("other", sctd={"interval": 5}) == 2
    assert "sctd.interval: 4 -> 5" in capsys.readouterr().err
    assert start("run") == 0
    ours, theirs = (metrics.read(run / "metrics.jsonl") for run in (tmp_path / "run", finished / "whole"))
    ours, theirs = ([r for r in records if r["event"] == "train"] for records in (ours, theirs))
    assert [(r["step"], r["mode"], r["lr"]) for r in ours] == [(r["step"], r["mode"], r["lr"]) for r in theirs[4:]]
    # Dropout draws anew, which moves a loss by less than four steps of learning do.
    assert abs(ours[0]["loss"] - theirs[4]["loss"]) < 0.5 * abs(theirs[4]["loss"] - theirs[0]["loss"])
    (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"")
    assert start("damaged") == 2
    assert "mp_rank_00_model_states.pt has 0 bytes" in capsys.readouterr().err
