"""The control of equal operations, and finished runs side by side."""

import json

import pytest

from helpers.runs import settings, write_settings
from sctd_ds import ConfigError, compare, pretrain
from sctd_ds.method.flops import Shape, sequence_flops
from sctd_ds.method.schedule import step_mode
from sctd_ds.run import control, job, metrics

SHAPE = Shape(layers=4, hidden=32, intermediate=64, vocabulary=320, length=32, labels=4)


@pytest.mark.parametrize("method", [{}, {"method": "token_drop"}, {"dense_start": 0.3, "dense_finish": 100}])
def test_the_control_takes_the_operations_of_the_run(method):
    run = job.load(settings(sctd=method, pretrain={"steps": 1000}))
    written = control.equal_compute(run, SHAPE)
    dense = job.load(written)
    ours = sum(sequence_flops(SHAPE, run.sctd, step_mode(run.sctd, t)) for t in range(1, 1001))
    a_step = sequence_flops(SHAPE, dense.sctd, "dense")
    assert dense.pretrain.steps < 1000 and abs(dense.pretrain.steps * a_step - ours) <= a_step / 2
    assert dense.deepspeed["scheduler"]["params"]["total_num_steps"] == dense.pretrain.steps  # its own decay to zero
    changed = {key for key, value in run.flat().items() if dense.flat()[key] != value and not key.startswith("sctd.")}
    assert changed == {"pretrain.steps", "scheduler.params.total_num_steps"}


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """A run and its control, as a user starts them."""
    folder = tmp_path_factory.mktemp("compared")
    file = write_settings(folder / "mini.json", sctd={"dense_start": 2})
    common = ["--data", str(small_data)]

    def start(file, *more):
        return pretrain.run_and_report(["--deepspeed_config", str(file), *common, *map(str, more)])

    fairest = folder / "controls" / "mini_control.json"
    assert start(file, "--write-control", fairest, "--output", folder / "nothing") == 0
    assert not (folder / "nothing").exists()
    assert start(file, "--write-control", fairest) == 2  # never over a file that is there
    assert start(file, "--output", folder / "ours") == 0
    assert start(file, "--set", "sctd.interval=2", "--write-control", folder / "other.json", "--output", folder / "ours") == 0
    # The file names its data.
    assert pretrain.run_and_report(["--deepspeed_config", str(fairest), "--output", str(folder / "control")]) == 0
    return folder


def test_a_run_beside_its_control(runs, capsys):
    assert compare.main([str(runs / "ours"), str(runs / "control"), "--out", str(runs / "both")]) == 0
    ours, dense = (compare.read(runs / name) for name in ("ours", "control"))
    assert dense.report["method"] == "dense" and dense.report["steps"] < ours.report["steps"]
    text = (runs / "both" / "compare.md").read_text()
    assert text in capsys.readouterr().out
    assert f"{ours.loss:.4f}" in text and f"{dense.loss - ours.loss:+.4f}" in text
    assert (runs / "both" / "compare.png").stat().st_size > 10_000
    # Each mode costs what it costs, step by step.
    flops, train = ours.report["flops_per_sequence"], metrics.of("train", metrics.read(runs / "ours" / "metrics.jsonl"))
    assert ours.curve[-1].operations == pytest.approx(8 * sum(flops[record["mode"]] for record in train))
    ratio = dense.curve[-1].operations / ours.curve[-1].operations
    assert abs(ratio - 1) < 0.5 / dense.report["steps"] + 1e-9  # within half a step
    assert ("Not of equal operations" in text) == (abs(ratio - 1) > compare.EQUAL)


def test_runs_that_do_not_compare_are_refused(runs, tmp_path, capsys):
    def refused(*folders):
        assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    report = json.loads((runs / "ours" / "report.json").read_text())
    other, older = tmp_path / "other", tmp_path / "older"
    for folder, change in ((other, {"validated_on": {**report["validated_on"], "rows": 99}}), (older, {"validated_on": {}})):
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({**report, **change}))
        (folder / "metrics.jsonl").write_text((runs / "ours" / "metrics.jsonl").read_text())
    assert "validated on different text (rows: 99 and " in refused(runs / "ours", other)
    assert "earlier version" in refused(runs / "ours", older)
    assert "cannot be read" in refused(runs / "ours", tmp_path / "gone")
    assert "at least two runs" in refused(runs / "ours")


def test_a_dense_run_has_no_control(tmp_path):
    with pytest.raises(ConfigError, match="the run is dense itself"):
        control.write(job.load(settings(sctd={"method": "dense"})), SHAPE, "text", tmp_path / "control.json")
