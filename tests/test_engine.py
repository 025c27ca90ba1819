"""The engine in real launches with one and two ranks: schedule, ZeRO stages, table, overflow, NaN, checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch

from sctd_ds.engine import ranks
from sctd_ds.engine.checkpoint import _placed

KINDS = ["drop", "drop", "align", "drop", "drop", "align", "drop"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    loaded = {"folder": folder}
    for world in (1, 2):
        done = launch(ROOT / "tests" / "engine_scenarios.py", folder, ranks=world)
        assert done.returncode == 0, done.stdout[-3000:]
        for rank in range(world):
            loaded[world, rank] = torch.load(folder / f"world{world}_rank{rank}.pt", weights_only=True)
    return loaded


RANKS = [(1, 0), (2, 0), (2, 1)]


def assert_same_run(one, other, tolerance):
    assert one["kinds"] == other["kinds"]
    torch.testing.assert_close(one["losses"], other["losses"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one["scores"], other["scores"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", RANKS)
def test_schedule_counts_optimizer_steps_and_not_micro_batches(results, rank):
    for name in ("zero0", "zero1", "zero2", "accumulation1", "accumulation4", "bf16"):
        assert results[rank][name]["kinds"] == KINDS, name
    assert set(results[rank]["spread"]["kinds"]) == {"align"}
    assert set(results[rank]["dense"]["kinds"]) == {"dense"}


@pytest.mark.parametrize("rank", RANKS)
def test_zero_stages_agree(results, rank):
    for stage in ("zero1", "zero2"):
        assert_same_run(results[rank]["zero0"], results[rank][stage], 1e-5)


@pytest.mark.parametrize("name", ["zero2", "frequency", "accumulation4", "spread"])
def test_table_is_the_same_on_ranks_bit_for_bit(results, name):
    assert torch.equal(results[2, 0][name]["scores"], results[2, 1][name]["scores"])
    assert not torch.equal(results[2, 0][name]["scores"], torch.full_like(results[2, 0][name]["scores"], 10.0))


def test_table_and_losses_do_not_depend_on_world_size_or_accumulation(results):
    for name in ("accumulation1", "accumulation4"):
        assert_same_run(results[1, 0]["zero2"], results[1, 0][name], 1e-4)
    assert_same_run(results[1, 0]["zero2"], results[2, 0]["zero2"], 1e-4)


@pytest.mark.parametrize("rank", RANKS)
def test_training_lowers_the_loss_and_keeps_the_table_in_fp32(results, rank):
    for name in ("zero2", "bf16", "spread", "random", "frequency", "dense"):
        losses = results[rank][name]["losses"]
        assert torch.isfinite(losses).all() and losses[-2:].mean() < losses[:2].mean(), name
        assert results[rank][name]["scores"].dtype == torch.float32


@pytest.mark.parametrize("rank", RANKS)
def test_a_recipes_own_loop_is_train_batch(results, rank):
    for name, weight in results[rank]["by_hand"].items():
        assert torch.equal(weight, results[rank]["zero2"]["weights"][name]), name


@pytest.mark.parametrize("rank", RANKS)
def test_overflowed_step_changes_nothing_and_is_not_counted(results, rank):
    assert results[rank]["overflow"] == {
        "applied": 2, "kind": "align", "kind_after": "align", "weights_same": True, "scores_same": True, "applied_after": 3,
    }  # fmt: skip


@pytest.mark.parametrize("rank", RANKS)
def test_fp16_skips_steps_until_the_loss_scale_fits_and_resumes_exactly(results, rank):
    fp16 = results[rank]["fp16"]
    assert fp16["first"] == {"skipped": 1, "applied": 0, "weights_same": True, "scores_same": True}
    # Every step of the schedule is tried until it is applied, and only then the next.
    applied = [step for step, _ in fp16["tried"]]
    assert sorted(set(applied)) == list(range(len(KINDS))) and applied == sorted(applied) and len(applied) > len(KINDS)
    assert all(kind == KINDS[step] for step, kind in fp16["tried"])
    assert fp16["losses"][-1] < fp16["losses"][0]
    scale, restored = fp16["scales"]
    assert restored == scale < 2**28
    assert fp16["went_on"]["kinds"] == fp16["resumed"]["kinds"] and fp16["resumed"]["scores"].dtype == torch.float32
    for name in ("losses", "scores"):
        assert torch.equal(fp16["went_on"][name], fp16["resumed"][name]), name
    assert all(torch.equal(w, fp16["resumed"]["weights"][name]) for name, w in fp16["went_on"]["weights"].items())


@pytest.mark.parametrize("rank", RANKS)
def test_nan_on_one_rank_stops_all_before_the_update(results, rank):
    poisoned = results[rank]["poisoned"]
    assert poisoned["step"] == 2 and poisoned["weights_same"] and poisoned["scores_finite"]
    here = rank[1] == rank[0] - 1
    assert poisoned["here"] == (["ce_drop", "loss"] if here else [])


@pytest.mark.parametrize("rank", RANKS)
def test_checkpoint_restores_table_schedule_and_client_state(results, rank):
    assert results[rank]["loaded"] == {
        "client": 5, "ours_hidden": True, "applied": 4, "found": True, "scores_same": True, "kind": "drop",
    }  # fmt: skip


@pytest.mark.parametrize("rank", RANKS)
def test_export_takes_the_fp32_weights_of_a_16_bit_run(results, rank):
    assert results[rank]["master_weights"] == {"fp32": True, "rounds_to_the_model": True, "finer_than_the_model": True}


def test_export_is_a_plain_hugging_face_model(results):
    from transformers import AutoModelForMaskedLM

    one, two = (AutoModelForMaskedLM.from_pretrained(results["folder"] / f"exported{world}") for world in (1, 2))
    assert next(one.parameters()).dtype == torch.float32
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_rank_works_on_its_own_device_from_the_start(monkeypatch):
    """DeepSpeed sets it in its engine only, and ranks talk before there is one."""
    chosen = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", set_device=chosen.append)
    monkeypatch.setattr(ranks, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(ranks.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks.init_distributed()
    assert chosen == [3]
    monkeypatch.delenv("LOCAL_RANK")  # no launcher: whoever started the ranks has given them their devices
    ranks.init_distributed()
    assert chosen == [3]


@pytest.mark.parametrize(("group", "device"), [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")])
def test_a_step_count_is_put_where_its_optimizer_reads_it(group, device):
    placed = _placed({"step": torch.tensor(3.0)}, group, torch.device("meta"))
    assert placed["step"].device.type == device
