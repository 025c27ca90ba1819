"""The pipeline in real launches, 2 stages on 2 ranks and 2 replicas of 2 stages on 4: the same model, gradient and run."""

import pytest
import torch
from conftest import ROOT, launch

BOUNDARIES = ["in_full", "before_cross", "after_cross", "in_kept", "before_last"]
VARIANTS = ["spread_2", "spread_5", "two_prefixes", "kept_and_mean", "dense"]
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
    for name in VARIANTS + (BOUNDARIES if rank[0] == 2 else []):
        case = results[rank][name]
        assert case["moved"] > 1e-2, name
        assert case["loss_gap"] < 1e-5 and case["weight_gap"] < 1e-5 * case["moved"] + 1e-6 and case["scores_same"], (
            name,
            case,
        )


@pytest.mark.parametrize("rank", RANKS)
def test_forty_steps_are_those_of_the_zero_engine(results, rank):
    pipeline, other = results[rank]["run"], results[rank]["data_parallel"]
    assert pipeline["losses"][-1] < pipeline["losses"][0] - 0.5
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


@pytest.mark.parametrize("rank", RANKS)
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
    """ZeRO-2 shards of 2 or 4 ranks into a pipeline, and a pipeline's shards into ZeRO-2 of 4 ranks, after step 4 of 40."""
    expected = results[rank]["data_parallel"]["losses"][4:8]
    for name in ("from_data_parallel", *(["from_pipeline"] if rank[0] == 4 else [])):
        assert results[rank][name]["position"] == 48
        torch.testing.assert_close(results[rank][name]["losses"], expected, rtol=1e-5, atol=1e-5)
