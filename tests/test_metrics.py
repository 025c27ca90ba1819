"""The table of metrics, what reads it, and what is recorded about a run's device and code."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import pytest
from matplotlib.figure import Figure

from helpers.runs import settings
from sctd_ds.method.flops import Shape
from sctd_ds.method.objective import PARTS
from sctd_ds.run import environment, job, metrics, report
from sctd_ds.run.metrics import METRICS, Metric, Metrics
from sctd_ds.run.output import OutputError
from sctd_ds.run.probe import Probe

VALUES = {"loss": 6.25, "lr": 1e-3, "step_ms": 250.0, "loss_scale": None, "skipped_steps": 0}
SHAPE = Shape(layers=4, hidden=32, intermediate=64, vocabulary=300, length=32, labels=4)


class Monitor:
    """DeepSpeed's monitor, as far as it is used."""

    enabled = True

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, events) -> None:
        self.events += events


def recording(folder, **changes) -> Metrics:
    defaults = {"start": 0, "total": 2, "every": 2, "batch": 8, "keep": False, "monitor": None, "rank": 0}
    return Metrics(folder, **{**defaults, **changes})


def record(folder, monitor=None, *, steps=(1, 2), keep=False, rank=0, **values):
    with recording(folder, start=steps[0] - 1, total=steps[-1], keep=keep, monitor=monitor, rank=rank) as recorded:
        for step in steps:
            recorded.train(step, "drop", {**VALUES, **values}, samples=8 * step)
        recorded.validation(steps[-1], {"loss_full": 5.5})
    return metrics.read(folder / "metrics.jsonl")


def test_a_line_in_the_table_brings_a_metric_into_every_output(tmp_path, monkeypatch, caplog):
    """metrics.jsonl, monitor, log line, report text and figure."""
    new = Metric("heat", "device heat", "{:.1f} C", shown="mean", drawn="loss")
    monkeypatch.setitem(METRICS, "train", (*METRICS["train"], new))
    monitor, figures = Monitor(), []
    with caplog.at_level("INFO"):
        records = record(tmp_path, monitor, heat=40.0)
    assert [r["heat"] for r in records if r["event"] == "train"] == [40.0, 40.0]
    assert ("Train/heat", 40.0, 2) in monitor.events
    assert "device heat 40.0 C" in caplog.text
    assert metrics.text("train", {"heat": 41.0}, {"heat": 39.5}) == "device heat 39.5 C -> 41.0 C"
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    report.plot(report.build(job.load(settings()), SHAPE, None, records), records, tmp_path / "report.png")
    curves = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert curves["train: device heat"] == [40.0, 40.0]
    assert curves["train: loss"] == [6.25, 6.25] and curves["validation: loss"] == [5.5]


def test_scores_are_drawn_where_there_are_some(tmp_path, monkeypatch):
    figures, run = [], job.load(settings())
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    scored = [{"event": "validation", "step": step, "loss_full": 5.0, "tense": 50.0 + step} for step in (1, 2)]
    for records in ([], scored):
        report.plot(report.build(run, SHAPE, None, records), records, tmp_path / "report.png")
    without, with_scores = ({axes.get_title(): axes for axes in figure.axes} for figure in figures)
    assert "Scores" not in without
    assert {line.get_label(): list(line.get_ydata()) for line in with_scores["Scores"].lines}["probe of tense"] == [51.0, 52.0]


def test_a_metric_without_a_line_is_refused_on_every_rank(tmp_path):
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r'"heat" is not in sctd_ds.run.metrics.METRICS\["train"\]'):
            record(tmp_path, rank=rank, heat=40.0)


def test_monitors_get_what_the_table_says_and_no_missing_value(tmp_path):
    monitor = Monitor()
    record(tmp_path, monitor, steps=(1,))
    trained = [("Train/loss", 6.25, 1), ("Train/step_ms", 250.0, 1), ("Train/lr", 1e-3, 1)]
    assert monitor.events == [*trained, ("Validation/loss_full", 5.5, 1)]
    monitor.enabled = False
    record(tmp_path, monitor, steps=(1,))
    assert len(monitor.events) == 4


def test_a_log_line_has_means_and_last_values(tmp_path, caplog):
    with caplog.at_level("INFO"), recording(tmp_path, total=10) as recorded:
        recorded.train(1, "drop", {"loss": 6.0, "lr": 1e-3, "step_ms": 100.0}, samples=8)
        assert "step 1/10" not in caplog.text
        recorded.train(2, "drop", {"loss": 5.0, "lr": 2e-3, "step_ms": 300.0}, samples=16)
    assert "step 2/10: loss 5.500, ms per step 200, lr 2.00e-03, about 0 min 01 s left" in caplog.text


def test_a_run_of_an_earlier_version_continues_its_records(tmp_path):
    """Earlier versions wrote "kind" for the mode; records of steps that are taken again and a torn last line disappear."""
    old = [{"event": "train", "step": step, "kind": "align", "loss": 1.0, "step_ms": 9.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old) + '{"event": "tr')
    records = record(tmp_path, steps=(3, 4), keep=True)
    train = metrics.of("train", records)
    assert [(r["step"], r["mode"]) for r in train] == [(1, "align"), (2, "align"), (3, "drop"), (4, "drop")]
    assert "kind" not in (tmp_path / "metrics.jsonl").read_text()


def test_damaged_lines_are_named_and_the_others_are_read(tmp_path, caplog):
    record(tmp_path, steps=tuple(range(1, 21)))
    file, kept = tmp_path / "metrics.jsonl", tmp_path / "metrics.damaged.jsonl"
    lines = file.read_bytes().splitlines()
    for number, line in [
        (3, b"\xff\xfe"),
        (5, b"[" * 100_000),
        (7, b'{"event": ["train"], "step": 7}'),
        (8, lines[7].replace(b"step_ms", b"stap_ms")),
        (9, lines[8].replace(b"drop", b"drip")),
        (11, lines[10].replace(b"6.25", b'"6.25"')),
        (12, lines[11].replace(b": 12,", b": " + b"1" * 5000 + b",")),
        (21, lines[20].replace(b"loss_full", b"loss_fall")),
    ]:
        lines[number - 1] = line
    damaged = b"\n".join([*lines, b""])
    file.write_bytes(damaged)
    good = [1, 2, 4, 6, 10, *range(13, 21)]
    assert [r["step"] for r in metrics.read(file)] == good
    assert "8 damaged lines are left out (3, 5, 7, 8, 9, 11, 12, 21)" in caplog.text
    records = record(tmp_path, steps=(21, 22), keep=True)
    assert [r["step"] for r in metrics.of("train", records)] == [*good, 21, 22]
    assert kept.read_bytes() == damaged


def test_whatever_bit_flips_in_the_records_a_report_can_be_made_of_them(tmp_path):
    record(tmp_path, steps=tuple(range(1, 9)))
    file, draw, run = tmp_path / "metrics.jsonl", random.Random(0), job.load(settings())
    written = file.read_bytes()
    for _ in range(300):
        place, bit = draw.randrange(len(written)), draw.randrange(8)
        file.write_bytes(written[:place] + bytes([written[place] ^ 1 << bit]) + written[place + 1 :])
        records = metrics.read(file)
        assert len(records) >= 7  # a flipped line end joins two lines
        made = report.build(run, SHAPE, None, records)
        report.text(made, tmp_path)
        metrics.curve(records, made.flops_per_sequence, 8)


FULL = "/dev/full"  # takes nothing: every write is "No space left on device"


@pytest.mark.parametrize("write", ["train", "validation", "flush", "many"])
def test_a_full_disk_is_one_error_with_the_file_and_a_remedy(tmp_path, write):
    recorded = recording(tmp_path)
    recorded._file = open(FULL, "w")  # noqa: SIM115, closed by `recorded`
    message = r"metrics\.jsonl: No space left on device\. The checkpoints are intact: free space"
    with pytest.raises(OutputError, match=message), recorded:
        if write == "validation":
            recorded.validation(1, {"loss_full": 5.5})
        for step in range(1, 1000 if write == "many" else 2):
            recorded.train(2 * step - 1, "drop", VALUES, samples=8)
        if write == "flush":
            recorded.flush()


def test_a_full_disk_does_not_hide_the_error_that_ends_a_run(tmp_path, caplog):
    recorded = recording(tmp_path)
    recorded._file = open(FULL, "w")  # noqa: SIM115, closed by `recorded`
    with pytest.raises(ZeroDivisionError), recorded:
        recorded.train(1, "drop", VALUES, samples=8)
        raise ZeroDivisionError
    assert "metrics.jsonl: No space left on device" in caplog.text


class FullMonitor(Monitor):
    def write_events(self, events) -> None:
        raise OSError(28, "No space left on device")


def test_a_monitor_without_space_is_one_error(tmp_path):
    with pytest.raises(OutputError, match=r"a monitor .*No space left"):
        record(tmp_path, FullMonitor())


def test_only_a_loss_beyond_the_range_of_the_last_steps_of_its_mode_is_a_spike(tmp_path, caplog):
    """100 steps between 5 and 6: the next may go up to 7."""

    def after(*losses: tuple[str, float]) -> list[str]:
        caplog.clear()
        with recording(tmp_path, total=10**6, every=10**6) as recorded:
            for step, (mode, loss) in enumerate(losses, start=1):
                recorded.train(step, mode, {**VALUES, "loss": loss}, samples=8 * step)
        return caplog.messages

    calm = [("drop", 5.0 + step % 2) for step in range(100)]
    assert after(*calm, ("drop", 7.0)) == []
    (told,) = after(*calm, ("drop", 7.1))
    assert told.startswith("step 101: the loss 7.100 is a spike, the 100 drop steps before had 5.000 to 6.000")
    assert "samples are 800 to 807 of the run" in told
    assert after(*calm, ("align", 70.0)) == []  # the first of its mode
    assert after(*calm[:99], ("drop", 70.0)) == []  # too few before it
    assert len(after(*calm, *[("drop", 70.0)] * 100)) == 1  # one that lasts is told once
    assert len(after(("drop", 70.0), *calm, ("drop", 7.1))) == 1  # the 70 is 101 steps ago
    # A run that continues knows the steps before.
    caplog.clear()
    after(*calm)
    with recording(tmp_path, start=100, total=10**6, keep=True) as recorded:
        recorded.train(101, "drop", {**VALUES, "loss": 7.1}, samples=808)
    assert "step 101: the loss 7.100 is a spike" in caplog.text


def test_report_json_keeps_its_keys(tmp_path):
    """Other people's scripts read them."""
    probe = Probe(step_ms={"dense": 4.0, "drop": 3.0, "align": 5.0}, bubble_share={"dense": 0.1})
    run = job.load(settings())
    written = json.loads(json.dumps(report.build(run, SHAPE, probe, record(tmp_path)).to_json()))
    wanted = """name architecture method steps planned_steps loss trained_model validation validated_on validation_before
    unigram_loss samples flops_saved flops_per_sequence
    kept_token_share mode_shares dense_phases run_step_ms samples_per_s tokens_per_s time_saved
    time_saved_against_huggingface step_ms mfu
    peak_memory_bytes environment ranks stages micro_batches bubble_share global_batch seq_length probe"""
    assert set(wanted.split()) == written.keys()
    about = "device python torch triton deepspeed transformers datasets sctd_ds commit cuda date"
    assert set(about.split()) == written["environment"].keys()
    assert written["loss"] == {"first": 6.25, "last": 6.25} and written["validation"]["loss_full"] == 5.5
    assert written["samples_per_s"] == 8 / 0.25 and written["tokens_per_s"] == 32 * 8 / 0.25
    assert written["time_saved"] == pytest.approx(1 - (11 * 3 + 3 * 5) / 14 / 4)  # 3 of the 14 steps align
    assert written["time_saved_against_huggingface"] is None  # not timed


def test_speed_against_the_peak_counts_the_operations_of_the_steps_taken(tmp_path, monkeypatch):
    run = job.load(settings())
    records = record(tmp_path)
    monkeypatch.setattr(environment, "PEAK_FLOPS", {})
    assert report.build(run, SHAPE, None, records).mfu is None
    monkeypatch.setattr(environment, "PEAK_FLOPS", {"": 1e9})
    found = report.build(run, SHAPE, None, records)
    assert found.mfu == pytest.approx(found.flops_per_sequence["drop"] * 8 / 0.25 / 1e9)


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("CPU x86_64", None)],
)
def test_peaks_are_those_of_the_whole_name(device, peak):
    assert environment.peak_flops(device) == peak


@pytest.fixture
def no_commit_given(monkeypatch):
    monkeypatch.delenv("SCTD_COMMIT", raising=False)


def test_a_machine_without_git_has_an_unknown_commit(no_commit_given, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    (tmp_path / ".git").mkdir()
    assert environment.commit() == "unknown"  # git finds no repository there
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() == "unknown"
    assert environment.Environment.collect().commit == "unknown"


@pytest.mark.skipif(shutil.which("git") is None, reason="makes a repository; CI has git")
def test_the_commit_is_this_code_s_and_not_that_of_a_repository_around_it(no_commit_given, monkeypatch, tmp_path):
    package = tmp_path / "site-packages"
    package.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    monkeypatch.setattr(environment, "_ROOT", package)
    assert environment.commit() == "unknown"
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert environment.commit() != "unknown" and head.startswith(environment.commit())


def test_packages_that_are_not_installed_are_unknown():
    found = environment.versions("torch", "no-such-package-of-ours")
    assert found["torch"][0].isdigit() and found["no-such-package-of-ours"] == "unknown"


def test_every_part_of_the_objective_is_in_the_table():
    assert set(PARTS) <= {metric.name for metric in METRICS["train"]}
