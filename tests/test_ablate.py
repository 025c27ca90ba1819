"""Ablations: what is planned, and what is said of runs that are finished."""

import json
from argparse import Namespace

import pytest
from conftest import ROOT

from benchmarks.ablate import BEGAN, in_order, plan, write
from sctd_ds import ConfigError


def ablation_options(tmp_path, **changes):
    values = {"config": ROOT / "ds_configs" / "tiny.json", "out": tmp_path, "data": None, "data_dir": None, "tasks": [],
              "sweep": ["method", "interval", "lambda", "objective"], "variants": None, "seeds": 3, "overrides": [],
              "gpus": 1}  # fmt: skip
    return Namespace(**{**values, **changes})


def test_ablations_share_runs_of_equal_settings(tmp_path):
    runs = plan(ablation_options(tmp_path))
    base = runs["method"]["sctd"]
    assert [run.changes for run in base] == [()] * 3 and [run.seed for run in base] == [0, 1, 2]
    assert base == runs["interval"]["Fi=10"] == runs["lambda"]["lambda=0.05"] == runs["objective"]["sctd"]
    assert runs["lambda"]["lambda=0"] == runs["objective"]["L_MLM"] != base
    ordered = in_order(runs, 3)
    assert len({run.name for run in ordered}) == len(ordered) == 3 * 17
    assert [run.seed for run in ordered[:15]] == [0] * 5 + [1] * 5 + [2] * 5  # the first sweep, seed by seed


def test_ablations_refuse_what_cannot_run_before_the_first_run(tmp_path):
    with pytest.raises(ConfigError, match="must be"):
        plan(ablation_options(tmp_path, overrides=["sctd.method=dense"]))
    with pytest.raises(ConfigError, match="Fi=7: not in the sweeps"):
        plan(ablation_options(tmp_path, variants=["Fi=7"]))
    with pytest.raises(ConfigError, match=r"unknown key"):
        plan(ablation_options(tmp_path, overrides=["sctd.intervall=3"]))


def test_ablation_tables_hold_finished_runs_only(tmp_path):
    options = ablation_options(tmp_path, sweep=["interval"])
    runs = plan(options)
    losses = {"dense": (3.0, 3.1, 2.9), "token_drop": (3.2, 3.4, 3.1), "Fi=10": (3.05, 3.2)}
    for variant, values in losses.items():
        for run, loss in zip(runs["interval"][variant], values, strict=False):
            folder = tmp_path / "runs" / run.name
            folder.mkdir(parents=True)
            validation = {"step": 10, "loss_full": loss}
            (folder / "report.json").write_text(json.dumps({
                "validation": validation, "global_batch": 32, "samples_per_s": 16.0, "flops_saved": 0.2, "steps": 10,
                "seq_length": 64, "environment": {"device": "CPU"},
            }))  # fmt: skip
            (folder / BEGAN).write_text(json.dumps({"commit": "abc", "settings": {}}))
            lines = [{"event": "train", "step": 10, "step_ms": 2000.0}, {"event": "validation", **validation}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write(tmp_path, runs, options)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert set(rows) == {"variant", "---", "dense", "token_drop", "Fi=10"}  # Fi=5, 20 and 50 were not run
    # Differences from token_drop -0.2, -0.3, -0.2: t = -7.0 with 2 degrees of freedom; Fi=10 has two of the three seeds.
    assert "| 3 | 3.0000 ± 0.1000 (p 0.020) | 2000.00 ± 0.00 |" in rows["dense"] and rows["dense"].endswith("| 77.73 |")
    assert "| 3 | 3.2333 ± 0.1528 |" in rows["token_drop"] and rows["Fi=10"].split("|")[2].strip() == "2"
    assert (tmp_path / "interval.png").stat().st_size > 10_000
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 3 + 3 + 2
