"""The equal-compute study: what a budget buys, what a multiplier is, and runs from the command to their tables."""

import csv
import json
import math

import pytest
import torch

import sctd_ds
from benchmarks import equal_compute, equal_compute_tables
from benchmarks.equal_compute_arms import ARMS, CONTROL, DEFAULT, REGIMES, STARTS, Arm, Costs, Study, choose
from benchmarks.equal_compute_tables import interval, multiplier, multipliers
from benchmarks.equal_compute_training import make_trunk, rate_at, read_text, run, start
from sctd_ds import ConfigError
from sctd_ds.method.flops import Shape
from sctd_ds.method.schedule import step_mode

MODEL = {"layers": 4, "hidden": 16, "heads": 2, "intermediate": 32, "rows": 4}
TINY = Study(budget=12, trunk_steps=6, trunk_budget=8, warmup=2, documents=300, labels=200, **MODEL)
OPTIONS = [part for name, value in vars(TINY).items() for part in (equal_compute.flag(name), str(value))]
COSTS = Costs(Shape(layers=8, hidden=64, intermediate=256, vocabulary=2000, length=32, labels=4), rows=48)


def command(out, *arguments: str) -> int:
    return equal_compute.main(["--out", str(out), *OPTIONS, *arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return read_text(TINY, tmp_path_factory.mktemp("equal-compute") / "data", "trunk")


@pytest.fixture(scope="module")
def trunk(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("trunks") / "seed-0.pt"
    make_trunk(TINY, text, 0, path)
    return path


# --- what a budget buys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [40, 517])
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_spends_the_budget_but_for_what_one_more_step_would_cost(name, budget):
    arm = ARMS[name]
    steps = COSTS.steps(arm, budget)
    config = arm.config(steps)
    of_modes = COSTS.of_modes(arm, config)
    spent = math.fsum(of_modes[step_mode(config, step)] for step in range(1, steps + 1))  # as it is really trained
    assert spent == pytest.approx(COSTS.of_run(arm, steps), rel=1e-12)
    allowed = arm.budget * budget
    assert spent <= allowed < COSTS.of_run(arm, steps + 1)
    # A longer run may be dense for one step more and shift an aligned step, so a step may add up to 1 + 1.34 - 0.74.
    assert allowed - spent < 1.61


def test_arms_that_drop_get_more_steps_than_dense_training_and_fewer_after_a_dense_start():
    steps = {name: COSTS.steps(arm, 1000) for name, arm in ARMS.items()}
    assert steps[CONTROL] == 1000 and steps["dense-1.35"] == 1350
    for method in ("token_drop", "random", "sctd"):
        in_order = [steps[f"{method}-{begin:g}"] for begin in STARTS]
        assert in_order == sorted(in_order, reverse=True) and in_order[-1] > 1000
        assert steps[f"{method}-0.2-finish"] < steps[f"{method}-0.2"]
    assert steps["random-0"] == steps["token_drop-0"] > steps["random-align-0"] == steps["sctd-0"]
    assert steps["fewer-layers"] > steps["token_drop-0"] and steps["fewer-rows"] == 1333


def test_a_budget_of_less_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="buys no step"):
        COSTS.steps(ARMS["sctd-0"], 0.5)


def test_the_rate_rises_from_scratch_and_falls_to_zero_over_an_arms_own_steps():
    study = Study(rate=1.0, warmup=10)
    assert [rate_at(study, "scratch", step, 100) for step in (1, 10, 11, 100)] == pytest.approx([0.1, 1.0, 1.0, 1 / 90])
    assert [rate_at(study, "trunk", step, 50) for step in (1, 26, 50)] == pytest.approx([1.0, 0.5, 0.02])


def test_arms_are_chosen_by_pattern():
    assert list(choose(["random-0.2", "dense-*"], ["scratch"])) == ["random-0.2", *(n for n in ARMS if n.startswith("dense-"))]
    assert set(choose(DEFAULT, REGIMES)) < set(ARMS)
    with pytest.raises(ConfigError, match=r"--arms sctd-0\.3: no arm"):
        choose(["sctd-0.3"], ["scratch"])


# --- the multiplier --------------------------------------------------------------------------------------------------


def test_the_multiplier_of_a_curve_that_is_a_logarithm_is_exact():
    dense = [(share * 2000, 3 - math.log(share)) for share in (0.75, 0.9, 1.0, 1.15, 1.35)]
    for worth in (0.75, 0.8, 1.0, 1.2, 1.35):
        found = multiplier(dense, 2000, 3 - math.log(worth))
        assert found.value == pytest.approx(worth) and found.bound == ""
        # An arm of fewer operations is worth more with the same loss.
        assert multiplier(dense, 1000, 3 - math.log(worth)).value == pytest.approx(2 * worth)


def test_a_loss_outside_the_dense_runs_bounds_the_multiplier():
    dense = [(1.35, 2.0), (0.75, 3.0), (1.0, 2.5)]
    best, worst = multiplier(dense, 1.0, 1.9), multiplier(dense, 1.0, 3.1)
    assert (best.value, best.bound) == (pytest.approx(1.35), ">")
    assert (worst.value, worst.bound) == (pytest.approx(0.75), "<")


def test_dense_runs_whose_loss_rises_by_chance_are_pooled():
    dense = [(0.5, 3.0), (1.0, 2.0), (4.0, 2.2), (8.0, 1.0)]  # the two in the middle become (2.0, 2.1)
    assert multiplier(dense, 1.0, 2.1).value == pytest.approx(2.0)
    assert multiplier(dense, 1.0, (3.0 + 2.1) / 2).value == pytest.approx(1.0)


def test_the_interval_covers_the_mean_and_shrinks_to_equal_seeds():
    low, high = interval([1.0, 1.1, 1.3])
    assert 1.0 <= low < 3.4 / 3 < high <= 1.3
    assert interval([1.2, 1.2]) == pytest.approx((1.2, 1.2)) and interval([1.2]) is None


def record(loss: float, dense_steps: float) -> dict:
    modes, method = {"dense": int(dense_steps)}, {"method": "dense"}
    return {
        "seed": 0,
        "loss_full": loss,
        "dense_steps": dense_steps,
        "steps": int(dense_steps),
        "modes": modes,
        "method": method,
    }


def test_a_run_is_compared_with_the_dense_runs_of_its_own_seed():
    runs = {name: {0: record(3 - math.log(share), 100 * share), 1: record(5 - math.log(share), 100 * share)}
            for name, share in (("dense-0.75", 0.75), (CONTROL, 1.0), ("dense-1.35", 1.35))}  # fmt: skip
    runs["random-0"] = {0: record(3 - math.log(1.2), 100), 1: record(5 - math.log(0.9), 100), 2: record(1.0, 100)}
    found = multipliers(runs, "random-0")
    assert {seed: m.value for seed, m in found.items()} == pytest.approx({0: 1.2, 1: 0.9})  # seed 2 has no dense run
    (_, _, *rows) = equal_compute_tables.arms_table(runs, ["random-0"]).splitlines()
    assert "1.05 [0.90, 1.20]" in rows[0] and "(-0.182, +0.105)" in rows[0]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_each_kind_of_arm_trains_end_to_end_and_every_table_has_it(tmp_path, capsys):
    arms = [name for name in ARMS if "-0" not in name or name.endswith(("-0", "-0.4-finish"))]
    assert command(tmp_path, "--regime", "scratch", "trunk", "--seeds", "1", "--arms", *arms) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "tables.md").read_text().strip() and "Decision rule" in printed
    assert (tmp_path / "equal_compute.png").stat().st_size > 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "curves.csv").open(newline="") as file:
        assert {(line["regime"], line["arm"]) for line in csv.DictReader(file)} == {(row["regime"], row["arm"]) for row in rows}
    scratch, trunk = ([row["arm"] for row in rows if row["regime"] == regime] for regime in REGIMES)
    assert sorted(scratch) == sorted(arms) and sorted(trunk) == sorted(set(arms) - {"fewer-layers"})
    for row in rows:
        stored = json.loads((tmp_path / "runs" / row["regime"] / row["arm"] / "seed-1.json").read_text())
        assert stored["labels"] >= TINY.labels and stored["environment"]["torch"] == torch.__version__
        assert math.isfinite(stored["loss_full"]) and stored["points"] and stored["seconds"] > 0
        assert sum(stored["modes"].values()) == stored["steps"] == int(row["steps"])
        last = stored["points"][-1]
        # Here the points are validated on all rows: the last one is the end, by another way through the model.
        assert last["step"] == stored["steps"] and last["loss_full"] == pytest.approx(stored["loss_full"], rel=1e-5)
        assert ("loss_drop" in last) == (ARMS[row["arm"]].method["method"] != "dense")


def test_finished_runs_are_kept_and_other_settings_are_refused(tmp_path, capsys):
    assert command(tmp_path, "--seeds", "0", "--arms", CONTROL) == 0
    (file,) = tmp_path.glob("runs/*/*/*.json")
    before = file.stat().st_mtime_ns, file.read_bytes()
    assert command(tmp_path, "--seeds", "0", "1", "--arms", CONTROL, "sctd-0") == 0
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    assert len(list(tmp_path.glob("runs/*/*/*.json"))) == 4
    capsys.readouterr()
    assert command(tmp_path, "--seeds", "0", "--arms", CONTROL, "--rate", "0.5") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rate: 0.002 -> 0.5" in error and str(file) in error
    assert command(tmp_path, "--tables-only") == 0


def test_equal_runs_are_equal_bit_for_bit(text):
    first, second = (run(TINY, text, "scratch", ARMS["sctd-0.2"], 3) for _ in range(2))
    assert first["loss_full"] == second["loss_full"] and first["points"] == second["points"]


def test_sctd_that_never_aligns_is_token_drop(text):
    """So the table of reasons needs no arm of its own for it."""
    never = Arm({"method": "sctd", "interval": 1_000_000, "dense_start": 0.2})
    runs = [run(TINY, text, "scratch", arm, 0) for arm in (never, ARMS["token_drop-0.2"])]
    assert runs[0]["loss_full"] == runs[1]["loss_full"] and runs[0]["steps"] == runs[1]["steps"]


@pytest.mark.parametrize("name", [CONTROL, "sctd-0", "random-0"])
def test_every_arm_starts_from_the_trunk_bit_for_bit(text, trunk, name):
    stored = torch.load(trunk, weights_only=True)
    trainer = start(TINY, text, "trunk", ARMS[name], 5, 0, trunk)
    weights = trainer.model.state_dict()
    assert weights.keys() == stored["model"].keys()
    assert all(torch.equal(value, stored["model"][key]) for key, value in weights.items())
    moments, kept = trainer.optimizer.state_dict()["state"], stored["optimizer"]["state"]
    assert all(torch.equal(moments[i][key], kept[i][key]) for i in kept for key in ("exp_avg", "exp_avg_sq", "step"))
    if name == "sctd-0":
        scores = sctd_ds.importance(trainer.model).scores
        assert torch.equal(scores, stored["importance"]["scores"]) and len(scores.unique()) > 2


def test_an_arm_from_the_trunk_reads_the_rows_that_follow(text, trunk):
    trainer = start(TINY, text, "trunk", ARMS[CONTROL], 5, 0, trunk)
    fresh = start(TINY, text, "scratch", ARMS[CONTROL], 5, 0, None)
    taken = [next(fresh._batches) for _ in range(TINY.trunk_steps + 1)]
    assert torch.equal(next(trainer._batches)["input_ids"], taken[-1]["input_ids"])


def test_a_trunk_of_other_settings_is_refused(tmp_path, capsys):
    arguments = ("--regime", "trunk", "--seeds", "0", "--arms")
    assert command(tmp_path, *arguments, CONTROL) == 0
    before = (tmp_path / "trunks" / "seed-0.pt").read_bytes()
    assert command(tmp_path, *arguments, "random-0") == 0
    assert (tmp_path / "trunks" / "seed-0.pt").read_bytes() == before
    capsys.readouterr()
    assert command(tmp_path, *arguments, "sctd-0", "--trunk-steps", "7") == 2
    assert "trunk_steps: 6 -> 7" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def fail(state, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert command(tmp_path, "--regime", "trunk", "--seeds", "0", "--arms", CONTROL) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed-0.pt: No space left" in error
    assert not list((tmp_path / "trunks").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--out DIR is missing"),
        (["--out", "x", "--arms", "nothing"], "--arms nothing: no arm"),
        (["--out", "x", "--layers", "3"], "--layers 3"),
        (["--out", "x", "--rate", "0"], "--rate 0.0: expected more than 0"),
        (["--out", "x", "--hidden", "65"], "not a multiple of --heads 2"),
        (["--out", "x", "--regime", "trunk", "--arms", "fewer-layers"], "from scratch only"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert equal_compute.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_held_out_set_with_too_few_labels_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="raise --documents"):
        read_text(TINY.model_copy(update={"labels": 10**6}), tmp_path, "scratch")


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Another language than that of the trunk."""
    return read_text(TINY.model_copy(update={"text": "language:1"}), tmp_path_factory.mktemp("moved"), "trunk")


def test_a_trunk_of_another_text_shares_the_vocabulary_and_no_rows(text, moved, tmp_path):
    study = TINY.model_copy(update={"text": "language:1"})
    vocabulary = moved.packed.tokenizer.get_vocab()
    assert vocabulary == moved.trunk.tokenizer.get_vocab() != text.packed.tokenizer.get_vocab()
    assert moved.trunk.meta.fingerprint != moved.packed.meta.fingerprint and text.trunk is text.packed
    make_trunk(study, moved, 0, tmp_path / "trunk.pt")
    trainer = start(study, moved, "trunk", ARMS[CONTROL], 5, 0, tmp_path / "trunk.pt")
    fresh = start(study, moved, "scratch", ARMS[CONTROL], 5, 0, None)
    assert torch.equal(next(trainer._batches)["input_ids"], next(fresh._batches)["input_ids"])  # its rows from the first on
    assert not torch.equal(trainer.model.state_dict()["cls.predictions.bias"], fresh.model.state_dict()["cls.predictions.bias"])


def test_a_source_of_text_is_used_as_it_is(tmp_path):
    source = tmp_path / "my.txt"
    source.write_text("\n\n".join(f"A sentence about the number {i} and nothing else at all ." for i in range(400)))
    read = read_text(
        TINY.model_copy(update={"text": str(source), "labels": 20, "vocabulary": 200}), tmp_path / "data", "scratch"
    )
    assert "sentence" in read.packed.tokenizer.get_vocab() and len(read.packed.tokenizer) <= 200
    with pytest.raises(ConfigError, match="language:x: expected"):
        read_text(TINY.model_copy(update={"text": "language:x"}), tmp_path / "data", "scratch")


def test_list_names_every_arm_and_help_every_setting(capsys):
    assert equal_compute.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(ARMS)
    with pytest.raises(SystemExit):
        equal_compute.main(["--help"])
    described = capsys.readouterr().out
    assert all(equal_compute.flag(name) in described for name in vars(TINY))
