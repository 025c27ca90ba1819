"""Ablations: the planned runs, the tables of finished runs, and a sweep from its configuration to its figure."""

import csv
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

import sctd_ds
from benchmarks import ablate, ablation_tables
from benchmarks.ablate import SWEEPS, configured, plan, tabulate
from benchmarks.ablation_tables import BEGAN, PAPER, Outcome, Run, in_order, measured, operations, score
from helpers import ROOT
from helpers.runs import write_settings
from sctd_ds import ConfigError, ScTDConfig, data
from sctd_ds.config import MAY_DIFFER_IN_TABLE, MAY_DIFFER_ON_RESUME
from sctd_ds.eval import synthetic
from sctd_ds.integrations.export import ImportanceTable, read_importance
from sctd_ds.method.flops import Shape, flops_saved, sequence_flops
from sctd_ds.method.schedule import MODES, mean_cost
from sctd_ds.method.selection import PINNED
from sctd_ds.run.models import model_config
from sctd_ds.run.settings import RunConfig, load


def ablation_options(out: Path, **changes) -> Namespace:
    where = {"config": ROOT / "ds_configs" / "tiny.json", "out": out, "data": None, "data_dir": None}
    what = {"sweep": ["method", "interval", "lambda", "objective"], "variants": None, "seeds": 3, "overrides": []}
    how = {"gpus": 1, "points": 1, "tasks": []}
    return Namespace(**{**where, **what, **how, **changes})


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sweeps_share_runs_of_equal_settings(tmp_path):
    runs = plan(ablation_options(tmp_path))
    base = runs["method"]["sctd"]
    assert [run.changes for run in base] == [()] * 3 and [run.seed for run in base] == [0, 1, 2]
    assert base == runs["interval"]["Fi=10"] == runs["lambda"]["lambda=0.05"] == runs["objective"]["sctd"]
    assert runs["lambda"]["lambda=0"] == runs["objective"]["L_MLM"] != base
    ordered = in_order(runs)
    assert len({run.name for run in ordered}) == len(ordered) == 3 * 18
    assert [run.seed for run in ordered[:18]] == [0] * 6 + [1] * 6 + [2] * 6  # the first sweep, seed by seed


@pytest.mark.parametrize(("config", "layers"), [("tiny", 5), ("large", 18)])
def test_fewer_layers_is_a_dense_model_of_about_the_operations_of_token_drop(tmp_path, config, layers):
    options = ablation_options(tmp_path, sweep=["method"], config=ROOT / "ds_configs" / f"{config}.json")
    (run, *_) = plan(options)["method"]["fewer layers"]
    of = configured(run, options)[0]
    assert of.sctd.method == "dense" and of.pretrain.model["num_hidden_layers"] == layers


def test_a_trained_model_has_no_variant_of_fewer_layers(tmp_path, capsys):
    BertConfig(num_hidden_layers=12, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    options = ablation_options(tmp_path, sweep=["method"], overrides=[f"pretrain.model={tmp_path / 'model'}"])
    assert set(plan(options)["method"]) == {*SWEEPS["method"]} - {"fewer layers"}
    assert "fewer layers: left out" in capsys.readouterr().err


def test_rows_of_table_4_learn_the_terms_they_are_named_after(tmp_path):
    """Every row of the paper is planned, and a term is in the objective exactly if its name is in the row's name."""
    options = ablation_options(tmp_path, sweep=["objective"])
    rows = plan(options)["objective"]
    assert set(rows) == set(PAPER["objective"][1])
    for name, (run, *_) in rows.items():
        config = configured(run, options)[0].sctd
        terms = {"sctd": {"L_MLM", "L_SCl", "L_SCg"}, "dense": set(), "token_drop": set()}.get(name, set(name.split("+")))
        learned = config.kl_layers if config.method == "sctd" and config.kl_weight else None
        assert ("L_SCg" in terms) == (learned in ("both", "last")), name
        assert ("L_SCl" in terms) == (learned in ("both", "previous")), name
        assert ("L_MLM" in terms) == (config.method == "sctd" and config.objective == "paper"), name
        assert config.method == (name if name in ("dense", "token_drop") else "sctd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ["sctd.method=dense"]}, "must be"),
        ({"variants": ["Fi=7"]}, "Fi=7: not in the sweeps"),
        ({"overrides": ["sctd.intervall=3"]}, "unknown key"),
        ({"tasks": ["rte", "rtf"], "data_dir": ROOT}, "--tasks rtf: unknown"),
        ({"tasks": ["rte"]}, "needs --data-dir"),
        ({"points": 5}, "needs --data-dir"),
        ({"points": 10**6, "data_dir": ROOT}, "the steps of a run"),
        ({"seeds": 0}, "--seeds 0: expected at least 1"),
        ({"gpus": 0}, "--gpus 0: expected at least 1"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(ablation_options(tmp_path, **changes))


@pytest.fixture
def ablation(tmp_path, small_data, monkeypatch):
    """A sweep of one variant with fake training. Calling it with arguments returns the status and the started runs."""
    (tmp_path / "text.txt").write_text("one two three")
    for kind in ("tokenizer", "model"):
        shutil.copytree(small_data / "tokenizer", tmp_path / kind)
    BertConfig(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    config = write_settings(tmp_path / "run.json", pretrain={"data": str(tmp_path / "text.txt")})
    started: list[str] = []

    def pretend(command: list[str], **_: object) -> Namespace:
        folder = Path(command[command.index("--output") + 1])
        started.append(folder.name)
        write_outcome(folder, 3.0)
        return Namespace(returncode=0)

    monkeypatch.setattr(ablate, "subprocess", Namespace(run=pretend, STDOUT=None))

    def call(*arguments: str) -> tuple[int, list[str]]:
        del started[:]
        command = ["--config", str(config), "--out", str(tmp_path / "out"), "--variants", "sctd", *arguments]
        return ablate.main(command), [*started]

    return call


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (["--set", "pretrain.data={}/other.txt"], "pretrain.data: ['{}/text.txt'] -> ['{}/other.txt']"),
        (["--data", "{}/other.txt"], "pretrain.data: ['{}/text.txt'] -> ['{}/other.txt']"),
        (["--set", "pretrain.validation_rows=16"], "pretrain.validation_rows: 8 -> 16"),
        # These change the step time, which the tables compare.
        (["--set", "pretrain.deterministic=true"], "pretrain.deterministic: False -> True"),
        (["--set", "pretrain.num_workers=1"], "pretrain.num_workers: 0 -> 1"),
        (["--set", "wall_clock_breakdown=true"], "wall_clock_breakdown: unset -> True"),
        (["--set", "gradient_clipping=2.0"], "gradient_clipping: 1.0 -> 2.0"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_before_any_starts(ablation, tmp_path, capsys, changes, difference):
    (tmp_path / "other.txt").write_text("four five six")
    assert ablation("--seeds", "1") == (0, ["base_seed-0"])
    assert ablation("--seeds", "2", *(text.format(tmp_path) for text in changes)) == (2, [])
    assert f"base_seed-0: started with other settings ({difference.format(tmp_path, tmp_path)}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs" / "base_seed-1").exists()


def test_what_neither_learns_nor_judges_otherwise_may_differ(ablation):
    assert ablation("--seeds", "1") == (0, ["base_seed-0"])
    free = {"log_every": 2, "validation_every": 7, "save_every": 7, "keep_last": 1, "probe_steps": 1}
    changes = [part for key, value in free.items() for part in ("--set", f"pretrain.{key}={value}")]
    monitor = ["--set", "csv_monitor.enabled=true", "--set", "steps_per_print=5"]
    assert ablation("--seeds", "2", *changes, *monitor) == (0, ["base_seed-1"])
    assert MAY_DIFFER_IN_TABLE < MAY_DIFFER_ON_RESUME


def test_a_text_that_was_edited_is_refused_and_one_that_is_gone_where_runs_need_it(ablation, tmp_path, capsys):
    text = tmp_path / "text.txt"
    assert ablation("--seeds", "1") == (0, ["base_seed-0"])
    text.write_text("one two three\n")  # the same documents, in a newer file
    assert ablation("--seeds", "2") == (0, ["base_seed-1"])
    text.write_text("one two four")
    assert ablation("--seeds", "3") == (2, [])
    assert "base_seed-0: started with other settings (pretrain.data (content): " in capsys.readouterr().err
    text.unlink()
    assert ablation("--seeds", "3") == (2, []) and "text.txt: no such file" in capsys.readouterr().err
    assert ablation("--seeds", "2") == (0, [])  # all runs are finished


@pytest.mark.parametrize("what", ["tokenizer", "model"])
def test_runs_on_another_tokenizer_or_trained_model_of_the_same_name_are_refused(ablation, tmp_path, capsys, what):
    given = ["--set", f"pretrain.{what}={tmp_path / what}"]
    assert ablation("--seeds", "1", *given) == (0, ["base_seed-0"])
    assert ablation("--seeds", "2", *given) == (0, ["base_seed-1"])
    (tmp_path / what / "tokenizer.json").write_text("{}")
    assert ablation("--seeds", "3", *given) == (2, [])
    assert f"base_seed-0: started with other settings (pretrain.{what} (content): " in capsys.readouterr().err


def test_runs_on_data_built_anew_under_the_same_name_are_refused(ablation, tmp_path, capsys, small_data):
    built = data.build([str(small_data.parent / "text.txt")], tmp_path / "built", vocab_size=300, seq_length=32)
    assert ablation("--seeds", "1", "--data", str(built)) == (0, ["base_seed-0"])
    again = {"tokenizer": str(small_data / "tokenizer"), "seq_length": 32, "overwrite": True}
    data.build([str(small_data.parent / "text.txt")], built, **again)
    assert ablation("--seeds", "2", "--data", str(built)) == (0, ["base_seed-1"])  # the same text and the same rows
    data.build([str(small_data.parent / "text.txt")], built, **again, seed=1)
    assert ablation("--seeds", "3", "--data", str(built)) == (2, [])
    assert "base_seed-0: started with other settings (pretrain.data (content): " in capsys.readouterr().err


def test_data_that_changes_while_an_ablation_runs_ends_it(ablation, tmp_path, monkeypatch):
    pretend = ablate.subprocess.run

    def edited_meanwhile(command: list[str], **more: object) -> Namespace:
        (tmp_path / "text.txt").write_text("one two four")
        return pretend(command, **more)

    monkeypatch.setattr(ablate.subprocess, "run", edited_meanwhile)
    with pytest.raises(SystemExit, match=r"base_seed-1: pretrain.data \(content\) changed since the first run"):
        ablation("--seeds", "2")


def test_a_table_of_frequencies_is_exported_as_one(tmp_path, small_data, monkeypatch):
    """Its scores are unchanged, pinned ids included, although the checkpoint's table lacks the counts behind them."""
    tokenizer = AutoTokenizer.from_pretrained(small_data / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    network = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    sctd_ds.export(network, tmp_path / "model", tokenizer)
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    scores = torch.rand(len(tokenizer)).index_fill_(0, torch.tensor([1, 2, 50]), PINNED)
    learned = ImportanceTable(scores, drop_ratio=0.25, policy="frequency")
    monkeypatch.setattr(ablate.Model, "read_checkpoint", lambda _: (network.state_dict(), learned))
    written = read_importance(ablate.export_point(tmp_path, 4))
    assert (written.policy, written.drop_ratio) == ("frequency", 0.25) and torch.equal(written.scores, scores)


def test_score_is_the_mean_over_tasks_or_else_over_probes():
    probes = {"probe-tense l-1, full": 80.0, "probe-number l-1, full": 70.0, "probe-tense l-1, dropped": 10.0}
    assert score(probes, []) == {"mean of probes": 75.0}
    assert score({**probes, "rte": 60.0, "boolq": 70.0, "copa": 1.0}, ["rte", "boolq"]) == {"mean of tasks": 65.0}
    assert score({**probes, "rte": 60.0}, ["rte", "boolq"]) == {}  # never a mean over fewer
    glue = dict.fromkeys(("cola", "mrpc", "stsb", "rte", "mnli"), 80.0) | {"sst2": 92.0}
    assert score(glue, [*glue]) == {"GLUE average": 82.0}


def finished_run(out: Path, run: Run, loss: float, saved: float = 0.2, dense_flops: float = 1e9) -> None:
    folder = run.folder(out)
    folder.mkdir(parents=True)
    (folder / BEGAN).write_text(json.dumps({"commit": "abc", "settings": {}}))
    write_outcome(folder, loss, saved, dense_flops)


def write_outcome(folder: Path, loss: float, saved: float = 0.2, dense_flops: float = 1e9) -> None:
    validation = {"step": 5, "loss_full": loss}
    report = {"validation": validation, "global_batch": 32, "samples_per_s": 16.0, "steps": 5, "seq_length": 64}
    flops = {"dense": dense_flops, "drop": 0.7 * dense_flops, "align": 1.2 * dense_flops}
    report |= {"flops_saved": saved, "flops_per_sequence": flops, "environment": {"device": "CPU"}}
    (folder / "report.json").write_text(json.dumps(report))
    modes, ms = ("drop", "drop", "align", "drop", "drop"), {"drop": 1000.0, "align": 3000.0}
    lines = [
        {"event": "train", "step": step, "mode": mode, "loss": loss, "step_ms": ms[mode]} for step, mode in enumerate(modes, 1)
    ]
    lines[3]["step_ms"] = 99000.0  # a stall of the machine, not of the method
    lines.insert(3, {"event": "validation", "step": 3, "loss_full": loss + 1})
    lines.append({"event": "validation", **validation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_hold_finished_runs_only(tmp_path):
    options = ablation_options(tmp_path, sweep=["interval"])
    runs = plan(options)
    losses = {"dense": (3.0, 3.1, 2.9), "token_drop": (3.2, 3.4, 3.1), "Fi=10": (3.05, 3.2)}
    for variant, values in losses.items():
        for run, loss in zip(runs["interval"][variant], values, strict=False):
            finished_run(tmp_path, run, loss)
    # One of the three dense models has been fine-tuned so far.
    scored = tmp_path / "eval" / "scores" / runs["interval"]["dense"][0].name / "rte" / "seed0.json"
    scored.parent.mkdir(parents=True)
    scored.write_text(json.dumps({"task": "rte", "scores": {"accuracy": 61.5}}))
    text = tabulate(runs, options)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert set(rows) == {"variant", "---", "dense", "token_drop", "Fi=10"}  # Fi=5, 20 and 50 were not run
    # Differences from token_drop -0.2, -0.3, -0.2: t = -7.0 with 2 degrees of freedom; Fi=10 has two of the three seeds.
    assert "| 3 | 3.0000 ± 0.1000 (p 0.020) | 2000.00 ± 0.00 |" in rows["dense"]
    assert rows["dense"].endswith("| 61.50 (of 1) | 0.00 | 77.73 | 74.15 |")
    assert "| 3 | 3.2333 ± 0.1528 |" in rows["token_drop"] and rows["Fi=10"].split("|")[2].strip() == "2"
    assert "2 tests in this table" in text and "p below 0.025" in text
    assert (tmp_path / "interval.png").stat().st_size > 10_000
    assert len(rows_of(tmp_path / "results.csv")) == 3 + 3 + 2
    # Time and operations accumulate along a run.
    curve = [row for row in rows_of(tmp_path / "curves.csv") if (row["variant"], row["seed"]) == ("dense", "1")]
    columns = ("step", "seconds", "dense_steps", "loss_full")
    assert [[float(row[key]) for key in columns] for row in curve] == [[3, 5, pytest.approx(2.6), 4.1], [5, 7, 4, 3.1]]


def test_a_run_of_one_point_is_drawn():
    axis = Figure().subplots()
    points = [{"step": 1.0, "seconds": 2.0, "loss_full": 3.0}, {"step": 2.0, "seconds": 4.0, "loss_full": 2.0}]
    outcomes = {"one": {0: Outcome({}, points[:1])}, "two": {0: Outcome({}, points)}}
    ablation_tables._plot_curves(axis, outcomes, "seconds", "loss_full")
    drawn = {len(line.get_xdata()): line.get_marker() for line in axis.lines if line.get_alpha()}
    assert drawn[1] == "o" and drawn[2] != "o"


def tiny_shape(layers: int) -> Shape:
    """The shape of ds_configs/tiny.json with this many layers."""
    return Shape(layers, hidden=64, intermediate=256, vocabulary=1024, length=16, labels=2)


@pytest.mark.parametrize("finished", [("dense", "sctd", "fewer layers"), ("fewer layers",)])
def test_operations_are_counted_against_the_base_s_depth_whatever_is_finished(tmp_path, finished):
    options = ablation_options(tmp_path, sweep=["method"], seeds=1)
    runs = plan(options)
    whole, shallow = (sequence_flops(tiny_shape(layers), ScTDConfig(), "dense") for layers in (6, 5))
    reported = {"dense": (0.0, whole), "sctd": (0.2, whole), "fewer layers": (0.0, shallow)}
    for variant in finished:
        saved, dense_flops = reported[variant]
        finished_run(tmp_path, runs["method"][variant][0], 3.0, saved, dense_flops)
    tabulate(runs, options)
    expected = {"dense": 0.0, "sctd": 20.0, "fewer layers": 100 * (1 - shallow / whole)}
    found = {row["variant"]: float(row["flops_saved"]) for row in rows_of(tmp_path / "results.csv")}
    assert found == pytest.approx({variant: expected[variant] for variant in finished})


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("last_layer", ["all", "labelled"])
def test_every_variant_counts_its_operations_in_dense_steps_of_the_base(tmp_path, last_layer, architecture):
    """Its own report suffices, because a variant changes a dense step only by its number of layers."""
    overrides = [f"sctd.last_layer={last_layer}"]
    if architecture == "modernbert":
        model = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 96}
        overrides.append("pretrain.model=" + json.dumps({**model, "model_type": architecture, "local_attention": 4}))
    options = ablation_options(tmp_path, seeds=1, overrides=overrides)
    base = load(options.config, options.overrides)

    def shape_of(run: RunConfig) -> Shape:
        return replace(Shape.of(model_config(run.pretrain), length=16, labels=2), vocabulary=1024)

    dense = sequence_flops(shape_of(base), base.sctd, "dense")
    for run in in_order(plan(options)):
        config = configured(run, options)[0]
        shape = shape_of(config)
        cost = {mode: sequence_flops(shape, config.sctd, mode) for mode in MODES}
        report = {"flops_saved": flops_saved(shape, config.sctd), "flops_per_sequence": cost}
        assert operations(run, report, base) == pytest.approx(mean_cost(config.sctd, cost) / dense), run.name


def test_nothing_is_said_where_nothing_was_run(tmp_path):
    options = ablation_options(tmp_path, sweep=["lambda"])
    assert "No run is finished." in tabulate(plan(options), options)
    assert not rows_of(tmp_path / "results.csv") and not (tmp_path / "lambda.png").exists()


def test_a_sweep_is_scored_along_its_run(tmp_path, small_data, monkeypatch, capsys):
    """From the configuration to Figure 6: a real run, its checkpoints as models, and their scores; nothing runs twice."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)  # transformers would take them for a launcher's
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    synthetic.write(tmp_path / "tasks", train=24, validation=12)
    out = tmp_path / "out"
    config = write_settings(tmp_path / "run.json", pretrain={"steps": 8})
    command = ["--config", str(config), "--out", str(out), "--data", str(small_data), "--data-dir", str(tmp_path / "tasks")]
    command += ["--sweep", "method", "--variants", "sctd", "--seeds", "1", "--points", "2"]
    command += ["--tasks", "rte", "--eval-arguments", "--max-steps 1"]
    assert ablate.main(command) == 0
    run = out / "runs" / "base_seed-0"
    assert sorted(path.name for path in (run / "points").iterdir()) == ["step_00000004"]
    curve = rows_of(out / "curves.csv")
    assert [int(row["step"]) for row in curve] == [4, 8]
    scored = {"4": measured("base_seed-0@4", out), "8": measured("base_seed-0", out)}
    assert all(float(row["mean of tasks"]) == scored[row["step"]]["rte"] for row in curve)
    (result,) = rows_of(out / "results.csv")
    assert result["mean of tasks"] == curve[-1]["mean of tasks"] and (out / "method.png").stat().st_size > 10_000
    assert "synthetic tasks" in capsys.readouterr().out

    # The last checkpoint is the exported model, bit for bit, and so is the table.
    last = ablate.export_point(run, 8)
    one, other = (AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in (run / "model", last))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    tables = [read_importance(folder) for folder in (run / "model", last)]
    assert torch.equal(tables[0].scores, tables[1].scores)
    earlier = AutoModelForMaskedLM.from_pretrained(run / "points" / "step_00000004").state_dict()
    assert not all(torch.equal(one[name], earlier[name]) for name in one)

    before = (out / "tables.md").read_text()
    monkeypatch.setattr(ablate.subprocess, "run", None)
    assert ablate.main(command) == 0
    assert (out / "tables.md").read_text() == before
    with pytest.raises(SystemExit, match=r"--points needs the checkpoints.*step_00000005"):
        ablate.export_point(run, 5)
