"""The main job as a user runs it: results, exact resume, signals, damaged checkpoints, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertTokenizer,
    DistilBertConfig,
    RobertaConfig,
    RobertaForMaskedLM,
)

import sctd_ds
from helpers import ROOT
from helpers.launch import launch, launch_command, launch_environment
from helpers.runs import (
    EPOCH,
    INTERVAL,
    STABLE_DECAY,
    STEPS,
    assert_same_end,
    continue_run,
    records,
    settings,
    train_whole_run,
    write_settings,
)
from helpers.scenarios import run_scenarios, scenario
from sctd_ds import data, pretrain
from sctd_ds.engine import checkpoint
from sctd_ds.engine.data_parallel import ScTDEngine
from sctd_ds.eval.grammar import Language
from sctd_ds.eval.sources import EvalError
from sctd_ds.eval.store import Model
from sctd_ds.integrations.export import read_importance
from sctd_ds.run import job, metrics, models, probe, report
from sctd_ds.run.metrics import Metrics

RESUMED = (1, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * EPOCH)
"""Steps whose checkpoints a run continues from: around an align step, and at the end of an epoch."""


EARLY = {"early_stopping": 3, "validation_every": 1, "steps": 40}
TOO_FAST = {"params": {"lr": 0.1, "torch_adam": True}}


MODERN = {**settings()["pretrain"]["model"], "model_type": "modernbert", "local_attention": 8}


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def rank(request, small_data, tmp_path_factory):
    """The first rank of a launch of the next four scenarios."""
    folder = tmp_path_factory.mktemp(f"resume{request.param}")
    write_settings(folder / "mini.json", pretrain={"data": str(small_data)})
    dense = {"dense_start": 3, "dense_finish": 0.2}
    write_settings(folder / "phases.json", pretrain={"data": str(small_data)}, sctd=dense, scheduler=STABLE_DECAY)
    write_settings(folder / "early.json", pretrain={"data": str(small_data), **EARLY}, optimizer=TOO_FAST)
    return run_scenarios(__name__, folder, ranks=request.param)[0]


@scenario
def whole(here):
    """A run that never stops."""
    train_whole_run(here.folder / "mini.json", here.folder / "whole")
    return str(here.folder / "whole")


@scenario(cases=RESUMED)
def resumed(here, step):
    continue_run(here.folder / "mini.json", here.folder / "whole", here.folder / f"from_{step}", step)
    return str(here.folder / f"from_{step}")


@scenario
def whole_with_dense_phases(here):
    """Steps 1 to 3 and the last 20 %, steps 12 to 14, are dense; the rate falls after step 10."""
    train_whole_run(here.folder / "phases.json", here.folder / "phases")
    return str(here.folder / "phases")


@scenario(cases=(2, 3, 11))
def resumed_with_dense_phases(here, step):
    continue_run(here.folder / "phases.json", here.folder / "phases", here.folder / f"phases_from_{step}", step)
    return str(here.folder / f"phases_from_{step}")


@scenario
def early(here):
    """A run whose rate is too high, so its loss rises soon."""
    train_whole_run(here.folder / "early.json", here.folder / "early")
    return str(here.folder / "early")


@scenario
def resumed_early(here):
    """From the checkpoint before the last: two of the three validations that end the run lie before it."""
    end = records(here.folder / "early")[-1]["step"]
    continue_run(here.folder / "early.json", here.folder / "early", here.folder / "early_resumed", end - 1)
    return str(here.folder / "early_resumed")


def test_early_stopping_counts_validations_and_resumes_exactly(rank):
    run = Path(rank(early))
    losses = [r["loss_full"] for r in metrics.read(run / "metrics.jsonl") if r["event"] == "validation"]
    assert losses.index(min(losses)) == len(losses) - 1 - EARLY["early_stopping"]
    assert_same_end(run, Path(rank(resumed_early)))
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == len(losses) < report["planned_steps"] == EARLY["steps"] and (run / "model").is_dir()


@pytest.mark.parametrize("step", [2, 3, 11])
def test_a_run_with_dense_phases_resumes_exactly(rank, step):
    assert_same_end(Path(rank(whole_with_dense_phases)), Path(rank(resumed_with_dense_phases, step)))


def test_a_run_with_dense_phases_says_so(rank):
    run = Path(rank(whole_with_dense_phases))
    train = [r for r in metrics.read(run / "metrics.jsonl") if r["event"] == "train"]
    rates = [0, 0.5, *[1.0] * 9, 0.75, 0.5, 0.25]
    assert [r["lr"] for r in train] == pytest.approx([2e-3 * x for x in rates])
    dropping = ["align" if t % INTERVAL == 0 else "drop" for t in range(4, 12)]
    assert [r["mode"] for r in train] == ["dense"] * 3 + dropping + ["dense"] * 3
    assert all(r["kept_token_share"] == (1.0 if r["mode"] == "dense" else 0.5) for r in train)
    report, always = (json.loads((Path(rank(of)) / "report.json").read_text()) for of in (whole_with_dense_phases, whole))
    assert report["dense_phases"] == [[1, 3], [12, 14]] and always["dense_phases"] == []
    assert report["mode_shares"] == pytest.approx({"dense": 6 / 14, "drop": 6 / 14, "align": 2 / 14})
    cost = report["flops_per_sequence"]
    taken = [cost[r["mode"]] for r in train]
    assert report["flops_saved"] == pytest.approx(1 - sum(taken) / len(taken) / cost["dense"])
    assert 0 < report["flops_saved"] < always["flops_saved"]


@pytest.mark.parametrize("step", RESUMED)
def test_resumed_run_is_the_run_that_never_stopped(rank, step):
    assert_same_end(Path(rank(whole)), Path(rank(resumed, step)))


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_resumed_run_in_16_bits_is_the_run_that_never_stopped(small_data, tmp_path, device):
    """fp16, which is bf16 on a CPU; on a GPU compiled, and with steps at the start that overflow."""
    how = {"steps": 12, "save_every": 6, "validation_every": 6, "deterministic": True}
    fp16 = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    config = write_settings(tmp_path / "mini.json", fp16=fp16, pretrain=how)
    whole, continued = tmp_path / "whole", tmp_path / "continued"
    for output in (whole, continued):
        if output is continued:
            shutil.copytree(whole, continued)
            shutil.rmtree(continued / "checkpoints" / "step_00000012")
        arguments = ("--deepspeed_config", config, "--data", small_data, "--output", output)
        done = launch(ROOT / "pretrain.py", *arguments, ranks=1, device=device)
        assert done.returncode == 0, done.stdout[-3000:]
    assert "continuing from" in done.stdout and "step_00000006" in done.stdout
    assert (records(whole)[-2]["skipped_steps"] > 0) == (device == "cuda")
    assert_same_end(whole, continued)


def test_run_writes_what_it_promises(rank):
    run = Path(rank(whole))
    train = [r for r in metrics.read(run / "metrics.jsonl") if r["event"] == "train"]
    assert [r["mode"] for r in train] == ["align" if t % INTERVAL == 0 else "drop" for t in range(1, STEPS + 1)]
    wanted = "step mode loss ce_drop lr grad_norm loss_scale step_ms tokens_per_s kept_token_share".split()
    assert all(key in r for r in train for key in wanted)
    assert all(("ce_full" in r and "kl_last" in r and "kl_previous" in r) == (r["mode"] == "align") for r in train)
    assert train[-1]["loss"] < train[0]["loss"]
    validations = [r for r in metrics.read(run / "metrics.jsonl") if r["event"] == "validation"]
    assert [r["step"] for r in validations] == [5, 10, 14]
    assert all(abs(r["gap"] - (r["loss_drop"] - r["loss_full"])) < 1e-9 and r["cosine_last"] <= 1 + 1e-6 for r in validations)
    report = json.loads((run / "report.json").read_text())
    assert 0 < report["flops_saved"] < 1
    assert report["time_saved"] is None  # probe_steps is 0 here: nothing measured, nothing claimed
    assert (run / "report.png").stat().st_size > 10_000
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    assert model(**tokenizer("bando kori", return_tensors="pt")).logits.shape[-1] == model.config.vocab_size
    assert "library_name" in (run / "model" / "README.md").read_text()


def test_sigterm_to_the_workers_saves_and_the_same_command_continues(small_data, tmp_path):
    steps = {"steps": 60, "save_every": 0, "validation_every": 0}
    config = write_settings(tmp_path / "mini.json", pretrain=steps)
    arguments = ["--deepspeed_config", config, "--data", small_data, "--output"]
    command = launch_command(ROOT / "pretrain.py", *arguments, tmp_path / "stopped", ranks=2)
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=launch_environment(), **captured)
    log = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while len(metrics.read(log)) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if any(word.startswith("--local_rank") for word in child.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGTERM)  # one rank receives it, both must agree
    output = process.communicate(timeout=600)[0]
    assert process.returncode != 0
    saved = list((tmp_path / "stopped" / "checkpoints").glob("step_*"))
    assert len(saved) == 1, output[-3000:]
    for folder in ("stopped", "whole"):
        done = launch(ROOT / "pretrain.py", *arguments, tmp_path / folder, ranks=2)
        assert done.returncode == 0, done.stdout[-3000:]
    assert "continuing from" not in done.stdout
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


# From here on in this process, one rank.


@pytest.fixture
def mini(small_data, tmp_path):
    """Runs pretrain.py's main with changes to the small configuration; returns the exit status."""

    def run(*more: str, output: str = "run", **changes) -> int:
        config = write_settings(tmp_path / "mini.json", **changes)
        return pretrain.run_and_report(
            ["--deepspeed_config", str(config), "--data", str(small_data), "--output", str(tmp_path / output), *more]
        )

    run.folder = tmp_path
    return run


FEW = {"steps": 4, "validation_every": 0}


def test_probe_leaves_no_trace_and_measures_every_mode(mini):
    assert mini(output="without", pretrain=FEW) == 0
    assert mini(output="with", pretrain={**FEW, "probe_steps": 2}) == 0
    assert_same_end(mini.folder / "without", mini.folder / "with")
    report = json.loads((mini.folder / "with" / "report.json").read_text())
    ms = report["step_ms"]
    assert set(ms) == {"dense", "drop", "align", "huggingface"} and all(v > 0 for v in ms.values())
    assert report["time_saved"] == pytest.approx(1 - (0.75 * ms["drop"] + 0.25 * ms["align"]) / ms["dense"])


def test_dry_run_forecasts_and_writes_nothing(mini, caplog):
    before = sorted(mini.folder.rglob("*"))
    with caplog.at_level("INFO"):
        assert mini("--dry-run") == 0
    assert sorted(p for p in mini.folder.rglob("*") if p.name != "mini.json") == before
    assert "a step is 1 rank x 4 rows x 2 micro-batches" in caplog.text
    assert re.search(r"whole run\s+14 steps, about [\d.,]+ hours", caplog.text) and "time saved" in caplog.text
    assert re.search(r"memory +[\d.]+ GiB of the [\d.]+ of this machine, .* computed: it fits", caplog.text)


def test_a_dry_run_for_another_machine_computes_memory_and_times_nothing(mini, caplog, monkeypatch, capsys):
    monkeypatch.setattr(probe, "measure", None)
    before = sorted(mini.folder.rglob("*"))
    with caplog.at_level("INFO"):
        assert mini("--dry-run", "--for", "h100:2") == 0
    assert sorted(p for p in mini.folder.rglob("*") if p.name != "mini.json") == before
    assert re.search(r"on 2 devices +a step is 2 ranks x \d+ rows", caplog.text)
    assert re.search(r"memory +[\d.]+ GiB of the 74.5 of h100, computed: it fits", caplog.text)
    assert "times            not measured" in caplog.text and "hours" not in caplog.text
    assert mini("--dry-run", "--for", "h100:7") == 2  # no such ranks for its batch
    assert mini("--for", "h100:2") == 2
    assert "--for h100:2 computes what a run would need, and trains nothing: add --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_slow_measurements_say_how_far_they_are(monkeypatch, caplog, capsys, terminal):
    monkeypatch.setattr(probe, "TELL_SECONDS", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with caplog.at_level("INFO"):
        probe.interleave({"dense": lambda: [], "drop": lambda: []}, rounds=2, warmup=1, tell="timing")
    assert ("timing: 3 of 6 turns, now drop" in caplog.text) != terminal
    assert ("timing" in capsys.readouterr().err) == terminal


def test_runs_of_other_seeds_hold_out_the_same_text(mini, small_data):
    text = str(small_data.parent / "text.txt")
    for seed in (0, 1):
        assert mini("--data", text, output=f"seed{seed}", pretrain={**FEW, "seed": seed, "vocab_size": 300}) == 0
    stored = [json.loads((mini.folder / f"seed{n}/checkpoints/step_00000004/settings.json").read_text()) for n in (0, 1)]
    first, second = (content["settings"] for content in stored)
    assert first["data.fingerprint"] == second["data.fingerprint"] and first["pretrain.seed"] != second["pretrain.seed"]


def test_loader_workers_change_nothing(mini):
    assert mini(output="none", pretrain=FEW) == 0
    assert mini(output="two", pretrain={**FEW, "num_workers": 2}) == 0
    assert records(mini.folder / "none") == records(mini.folder / "two")


def test_deterministic_kernels_where_the_settings_ask_for_them(mini, monkeypatch):
    """On a CPU they are the usual ones. The strict mode is on while the model trains, and nothing in a step refuses it."""
    modes, agree = [], ScTDEngine._agree

    def watch(self):
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        modes.append((torch.are_deterministic_algorithms_enabled(), warns_only, torch._inductor.config.deterministic))
        agree(self)

    monkeypatch.setattr(ScTDEngine, "_agree", watch)
    try:
        assert mini(output="usual", pretrain=FEW) == 0
        assert mini(output="strict", pretrain={**FEW, "deterministic": True}) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch._inductor.config.deterministic = False
    assert modes == [(False, False, False)] * 4 + [(True, False, True)] * 4
    assert_same_end(mini.folder / "usual", mini.folder / "strict")


def test_damaged_checkpoints_are_named_and_passed_over(mini, capsys, caplog):
    assert mini(pretrain={**FEW, "steps": 3}) == 0
    shutil.copytree(mini.folder / "run", mini.folder / "copy")
    checkpoints = mini.folder / "run" / "checkpoints"
    (checkpoints / "latest").write_text("")
    model = checkpoints / "step_00000003" / "mp_rank_00_model_states.pt"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    (checkpoints / "step_00000002" / "settings.json").unlink()
    (checkpoints / "partial-step_00000009").mkdir()
    assert mini(pretrain={**FEW, "steps": 3}) == 0
    assert "step_00000003" in caplog.text and "SHA-256" in caplog.text and "settings.json is missing" in caplog.text
    assert not (checkpoints / "partial-step_00000009").exists()
    assert records(mini.folder / "run") == records(mini.folder / "copy")
    for step in checkpoints.glob("step_*"):
        file = step / "mp_rank_00_model_states.pt"
        file.write_bytes(file.read_bytes()[:100])
    assert mini(pretrain={**FEW, "steps": 3}) == 2
    assert "every checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(mini, caplog):
    assert mini(pretrain=FEW) == 0
    checkpoints = mini.folder / "run" / "checkpoints"
    damaged = checkpoints / "step_00000004" / "mp_rank_00_model_states.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    assert mini(pretrain=FEW) == 0
    assert "replacing step_00000004" in caplog.text
    assert checkpoint.verify(checkpoints / "step_00000004") is None


def test_two_runs_cannot_write_in_one_folder(mini, capsys):
    folder = mini.folder / "run"
    folder.mkdir()
    holding = (
        "import sys; from pathlib import Path; from sctd_ds.run import lock; lock.hold(Path(sys.argv[1])); print(1, flush=True)"
    )
    command = [sys.executable, "-c", f"{holding}; sys.stdin.read()", str(folder)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert b"1\n" in other.stdout  # after what DeepSpeed prints
        assert mini(pretrain=FEW) == 2
        assert f"process {other.pid} on " in capsys.readouterr().err
        assert mini("--dry-run", pretrain=FEW) == 0  # it writes nothing
    finally:
        other.kill()
        other.communicate()
    assert not (folder / "checkpoints").exists()
    assert mini(pretrain=FEW) == 0  # the lock went with its process
    assert mini(pretrain=FEW) == 0  # and the same process may come back


def test_resume_must_and_never(mini, capsys):
    assert mini("--resume", "must") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert mini("--resume", "never", pretrain=FEW) == 0
    assert mini("--resume", "never", pretrain=FEW) == 2
    assert "--resume is never" in capsys.readouterr().err


def test_checkpoint_of_another_configuration_is_refused_with_the_difference(mini, capsys):
    assert mini(pretrain={**FEW, "steps": 2}) == 0
    assert mini("--set", "sctd.interval=5", pretrain={**FEW, "steps": 2}) == 2
    assert "sctd.interval: 4 -> 5" in capsys.readouterr().err
    assert mini("--set", "pretrain.log_every=7", pretrain={**FEW, "steps": 2}) == 0
    assert mini(pretrain=FEW) == 2
    assert "pretrain.steps: 2 -> 4" in capsys.readouterr().err
    assert "total_num_steps" not in capsys.readouterr().err  # it follows
    assert mini("--allow-change", "pretrain.steps", pretrain=FEW) == 0
    assert records(mini.folder / "run")[-2]["step"] == 4
    assert mini("--set", "scheduler.params.total_num_steps=9", pretrain=FEW) == 2
    assert "scheduler.params.total_num_steps: 4 -> 9" in capsys.readouterr().err


def test_a_branch_decays_from_a_stable_checkpoint(mini):
    """From that of the last step of a run at a constant rate, which itself can go on."""
    constant = {"type": "transformers.constant_with_warmup", "params": {"num_warmup_steps": 1}}
    assert mini(output="trunk", pretrain=FEW, scheduler=constant) == 0
    decay = {"type": "transformers.warmup_stable_decay", "params": {"num_warmup_steps": 1, "num_decay_steps": 2}}
    decay["params"]["decay_type"] = "linear"
    trunk = mini.folder / "trunk" / "checkpoints" / "step_00000004"
    branch = ["--start-from", str(trunk), "--allow-change", "scheduler", "--allow-change", "pretrain.steps"]
    assert mini(*branch, output="branch", pretrain={**FEW, "steps": 6}, scheduler=decay) == 0
    rates = [r["lr"] for r in records(mini.folder / "branch") if r["event"] == "train"]
    assert rates == [2e-3, 1e-3]
    # Another peak counts from the first step on.
    other = ["--set", "optimizer.params.lr=1e-3", "--allow-change", "optimizer.params.lr", "--allow-change", "pretrain.steps"]
    assert mini(*other, output="trunk", pretrain={**FEW, "steps": 6}, scheduler=constant) == 0
    assert [r["lr"] for r in records(mini.folder / "trunk") if r["event"] == "train"][-3:] == [2e-3, 1e-3, 1e-3]


def test_a_finished_early_run_ends_again_and_goes_on_with_more_patience(mini, caplog, capsys):
    caplog.set_level("INFO")
    assert mini(pretrain=EARLY, optimizer=TOO_FAST) == 0
    run = records(mini.folder / "run")
    end = run[-1]["step"]
    assert f"early end after step {end}: 3 validations in a row" in caplog.text
    assert f"{end} steps of 40 (the validation loss fell no more" in capsys.readouterr().out
    assert mini(pretrain=EARLY, optimizer=TOO_FAST) == 0 and records(mini.folder / "run") == run
    assert mini(pretrain={**EARLY, "early_stopping": 4}, optimizer=TOO_FAST) == 0
    assert records(mini.folder / "run")[-1]["step"] > end


def test_what_is_judged_while_a_run_trains_does_not_change_it(mini, capsys, caplog, tmp_path):
    """Scores of the probes and masked text in a run that validates often, beside one that validates at its end."""
    caplog.set_level("INFO")
    labels = {"train": 40, "validation": 20, "test": 20}
    splits = {"train": "tr", "validation": "va", "test": "te"}
    lines = [
        f"{splits[split]}\t{label}\t{sentence}"
        for split, n in labels.items()
        for label, sentence in Language().probe("tense", n, split)
    ]
    (tmp_path / "past_present.txt").write_text("\n".join(lines) + "\n")
    assert mini(output="often", pretrain={**FEW, "validation_every": 1, "evaluate": str(tmp_path)}) == 0
    assert mini(output="once", pretrain=FEW) == 0
    often, once = (records(mini.folder / name) for name in ("often", "once"))
    scores = [r.pop("tense") for r in often if r["event"] == "validation"]
    assert len(scores) == 4 and all(0 <= score <= 100 for score in scores) and not any("number" in r for r in often)
    assert [r for r in often if r["event"] == "train"] == [r for r in once if r["event"] == "train"]
    assert often[-1] == once[-1]  # the last validation
    assert [line.count("[MASK]") > 0 for line in caplog.messages if line.startswith("masked text at step 2: ")] == [True] * 3
    assert f"probe of tense {scores[-1]:.1f} %" in capsys.readouterr().out
    assert mini(output="none", pretrain={**FEW, "evaluate": str(tmp_path / "no")}) == 2
    assert "past_present.txt" in capsys.readouterr().err


def test_start_from_needs_a_step_to_be_left_and_forgets_the_folders_past(mini, capsys):
    assert mini(output="first", pretrain=FEW) == 0
    steps = mini.folder / "first" / "checkpoints"
    assert mini("--start-from", str(steps / "step_00000004"), output="second", pretrain=FEW) == 2
    assert "is at step 4, and the run ends at step 4: raise pretrain.steps" in capsys.readouterr().err
    assert mini("--start-from", str(mini.folder / "first"), output="second", pretrain=FEW) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    (mini.folder / "second").mkdir()
    shutil.copy(mini.folder / "first" / "metrics.jsonl", mini.folder / "second")  # of a run that died without a checkpoint
    assert mini("--start-from", str(steps / "step_00000002"), output="second", pretrain=FEW) == 0
    assert [r["step"] for r in records(mini.folder / "second") if r["event"] == "train"] == [3, 4]


def test_a_finished_run_cannot_be_shortened(mini, capsys):
    assert mini(pretrain=FEW) == 0
    assert mini("--allow-change", "pretrain.steps", pretrain={**FEW, "steps": 2}) == 2
    assert "is at step 4, and the run ends at step 2" in capsys.readouterr().err


def test_dry_run_refuses_what_the_run_would(mini, capsys):
    assert mini("--dry-run", "--resume", "must") == 2
    assert mini("--dry-run", "--start-from", str(mini.folder / "nowhere")) == 2
    assert mini(pretrain=FEW) == 0
    half = mini.folder / "run" / "checkpoints" / "partial-step_00000009"
    half.mkdir()
    assert mini("--dry-run", "--set", "sctd.interval=5", pretrain=FEW) == 2
    assert "sctd.interval: 4 -> 5" in capsys.readouterr().err
    assert mini("--dry-run", pretrain=FEW) == 0 and half.is_dir()


def test_the_records_of_a_checkpoints_steps_are_on_disk_before_it(mini, monkeypatch):
    written, save = [], checkpoint.save

    def watch(engine, folder, *rest):
        written.append([r["step"] for r in metrics.read(mini.folder / "run" / "metrics.jsonl") if r["event"] == "train"])
        return save(engine, folder, *rest)

    monkeypatch.setattr(checkpoint, "save", watch)
    assert mini(pretrain={**FEW, "save_every": 2, "log_every": 50}) == 0
    assert written == [[1, 2], [1, 2, 3, 4]]


def test_speed_counts_the_steps_that_were_taken(mini):
    """Three steps at interval 4: none aligned."""
    assert mini(pretrain={**FEW, "steps": 3}) == 0
    report = json.loads((mini.folder / "run" / "report.json").read_text())
    assert set(report["run_step_ms"]) == {"drop"}
    assert report["samples_per_s"] == pytest.approx(8 / report["run_step_ms"]["drop"] * 1000)


def test_steps_that_overflow_before_the_first_leave_no_checkpoint(mini, monkeypatch):
    """fp16 on this device: torch has it, DeepSpeed does not offer it here because it is slow."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    fp16 = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    assert mini(fp16=fp16, pretrain={**FEW, "steps": 3}, scheduler=STABLE_DECAY) == 0
    train = [r for r in records(mini.folder / "run") if r["event"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3] and train[0]["skipped_steps"] > 0
    assert [r["lr"] for r in train] == [0, 1e-3, 2e-3]  # steps that were skipped do not count
    names = sorted(p.name for p in (mini.folder / "run" / "checkpoints").glob("step_*"))
    assert names == ["step_00000001", "step_00000002", "step_00000003"]


def test_keep_last_and_failed_writes_leave_complete_checkpoints(mini, monkeypatch, capsys):
    assert mini(pretrain={**FEW, "keep_last": 2}) == 0
    checkpoints = mini.folder / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step_*")) == ["step_00000003", "step_00000004"]
    assert (checkpoints / "latest").read_text() == "step_00000004"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    assert mini("--allow-change", "pretrain.steps", pretrain={"steps": 6}) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(p.name for p in checkpoints.iterdir() if p.is_dir()) == ["step_00000003", "step_00000004"]
    assert all(checkpoint.verify(p) is None for p in checkpoints.glob("step_*"))


def test_nan_loss_stops_with_step_and_samples(mini, monkeypatch, capsys, caplog):
    original = models.build_model

    def poisoned(run, packed):
        model = original(run, packed)
        calls = []

        def hook(module, inputs, output):
            calls.extend([1] if module.training else [])  # not those for the report's samples
            return output * float("nan") if len(calls) == 5 else output

        model.cls.predictions.transform.register_forward_hook(hook)
        return model

    monkeypatch.setattr(models, "build_model", poisoned)
    assert mini(pretrain=FEW) == 3
    assert "step 3: the loss is not finite" in capsys.readouterr().err
    assert re.search(r"samples \(epoch, row\).*\[\(0, \d+\)", caplog.text)
    assert sorted(p.name for p in (mini.folder / "run" / "checkpoints").glob("step_*")) == ["step_00000001", "step_00000002"]


def test_loss_scale_at_its_minimum_is_explained(mini, monkeypatch, capsys):
    from deepspeed.runtime.engine import DeepSpeedEngine

    def exhausted(self, lr_kwargs):
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    monkeypatch.setattr(DeepSpeedEngine, "_take_model_step", exhausted)
    assert mini(pretrain=FEW) == 3
    assert re.search(r"step 1: the fp16 loss scale is at its minimum.*Use bf16", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("lost", "message"), [("*optim_states.pt", "0 of 1 shards"), ("sctd_random*", "no file of the ranks [0]")]
)
def test_a_checkpoint_without_the_files_of_all_ranks_gets_no_name(mini, monkeypatch, capsys, lost, message):
    original = ScTDEngine.save_checkpoint

    def save(self, folder, tag, **rest):
        original(self, folder, tag, **rest)
        for file in (Path(folder) / tag).glob(lost):
            file.unlink()

    monkeypatch.setattr(ScTDEngine, "save_checkpoint", save)
    assert mini(pretrain=FEW) == 2
    error = capsys.readouterr().err
    assert message in error and "do all nodes share this folder?" in error
    assert not [path for path in (mini.folder / "run" / "checkpoints").iterdir() if path.is_dir()]


def test_every_save_says_what_it_cost(mini, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        assert mini(pretrain={**FEW, "save_every": 2}) == 0
    written = [p.name for p in (mini.folder / "run" / "checkpoints").glob("step_*")]
    assert sorted(re.findall(r"saved (step_\d+): [\d.]+ MB in [\d.]+ s", caplog.text)) == sorted(written) and len(written) == 2
    assert "docs/reliability.md" not in caplog.text
    monkeypatch.setattr(metrics, "SLOW_SAVE", 0)
    with caplog.at_level("INFO"):
        assert mini(output="slow", pretrain=FEW) == 0
    assert "stop this run by `kill` of the process `deepspeed` alone" in caplog.text


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    """The folder of a finished run of four steps, with model/ inside, to continue from."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_settings(folder / "mini.json", pretrain=FEW)
    assert pretrain.main(["--deepspeed_config", str(config), "--data", str(small_data), "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_continuing_from_a_trained_model_takes_its_weights_tokenizer_and_table(mini, trained, small_data, capsys):
    model = trained / "model"
    run = job.load(settings(), [f"pretrain.model={model}"])
    built = models.build_model(run, data.load(small_data))
    plain = AutoModelForMaskedLM.from_pretrained(model).state_dict()
    assert built.training and built.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in built.state_dict().items())
    table = sctd_ds.importance(built).scores
    assert torch.equal(table, read_importance(model).scores) and table.unique().numel() > 2

    text = str(small_data.parent / "text.txt")  # raw text is cut by the model's tokenizer
    assert mini("--set", f"pretrain.model={model}", "--data", text, pretrain=FEW) == 0
    ended = [r for r in metrics.read(trained / "metrics.jsonl") if r["event"] == "validation"][-1]
    began, *_, after = [r for r in metrics.read(mini.folder / "run" / "metrics.jsonl") if r["event"] == "validation"]
    assert (began["step"], after["step"]) == (0, 4) and after["loss_full"] < began["loss_full"]
    assert "loss_full" in ended
    assert f"loss {began['loss_full']:.4f} -> {after['loss_full']:.4f}" in capsys.readouterr().out
    assert "| continued from | .../run/model |" in (mini.folder / "run" / "model" / "README.md").read_text()


def test_the_first_validation_of_a_trained_model_is_its_last_one(mini, trained):
    assert mini("--set", f"pretrain.model={trained / 'model'}", pretrain=FEW) == 0
    ended = [r for r in metrics.read(trained / "metrics.jsonl") if r["event"] == "validation"][-1]
    began = metrics.read(mini.folder / "run" / "metrics.jsonl")[0]
    same = ("loss_full", "loss_drop", "kl_last", "cosine_previous")  # the table is the same, too, and so is what is dropped
    assert began["step"] == 0 and [began[key] for key in same] == pytest.approx([ended[key] for key in same], abs=1e-6)


@pytest.mark.parametrize("architecture", ["roberta", "modernbert"])
def test_continuing_from_another_architecture(mini, small_data, architecture):
    """Its exported weights are those of the run, and a further run begins where it ended."""
    tokenizer = data.load(small_data).tokenizer
    sizes = {**settings()["pretrain"]["model"], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if architecture == "roberta":
        sizes["max_position_embeddings"] = 32 + tokenizer.pad_token_id + 1
    else:
        sizes |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "local_attention": 8}
    plain = AutoModelForMaskedLM.from_config(AutoConfig.for_model(architecture, **sizes))
    for part in (plain, tokenizer):
        part.save_pretrained(mini.folder / "plain")
    assert mini("--set", f"pretrain.model={mini.folder / 'plain'}", pretrain=FEW) == 0
    model = AutoModelForMaskedLM.from_pretrained(mini.folder / "run" / "model")
    assert type(model) is type(plain)

    weights, _ = checkpoint.read_model(mini.folder / "run" / "checkpoints" / "step_00000004")
    plain.load_state_dict(weights)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
    assert mini("--set", f"pretrain.model={mini.folder / 'run' / 'model'}", output="further", pretrain=FEW) == 0
    ended = [r for r in metrics.read(mini.folder / "run" / "metrics.jsonl") if r["event"] == "validation"][-1]
    began = metrics.read(mini.folder / "further" / "metrics.jsonl")[0]
    assert began["loss_drop"] == pytest.approx(ended["loss_drop"], abs=1e-6)  # the table is the same, too


def _changed_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "neither a preset nor a trained model that can be loaded"),
        (lambda model: DistilBertConfig().save_pretrained(model), 'of type "distilbert"; pretrain.py continues from bert,'),
        (lambda model: _changed_config(model, is_decoder=True), "a decoder"),
        (lambda model: _changed_config(model, num_hidden_layers=3), "at least 4"),
        (lambda model: _changed_config(model, num_hidden_layers=5), "its weights lack bert.encoder.layer.4"),
        (lambda model: _changed_config(model, hidden_size=64), "have another size of bert.embeddings"),
        (lambda model: _changed_config(model, max_position_embeddings=16), "has only 16 positions"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x" * 100), "its weights cannot be loaded"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no vocabulary"),
        (lambda model: save_file({}, model / "importance.safetensors"), "not an importance table"),
        (lambda model: _other_tokenizer(model), "built with another tokenizer than that of"),
        (lambda model: _cased_tokenizer(model), "built with another tokenizer than that of"),
    ],
)
def test_a_trained_model_that_will_not_do_is_refused_with_the_reason(mini, trained, capsys, damage, message):
    shutil.copytree(trained / "model", mini.folder / "model")
    damage(mini.folder / "model")
    assert mini("--set", f"pretrain.model={mini.folder / 'model'}") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (mini.folder / "run" / "checkpoints").exists()


def _other_tokenizer(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(model)


def _cased_tokenizer(model: Path) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_lower_case": False}))


@pytest.mark.parametrize("where", ["model", "tokenizer", "evaluation"])
def test_code_that_a_model_brings_does_not_run_and_nobody_is_asked(mini, trained, capsys, monkeypatch, where):
    asked, folder = [], mini.folder / "model"
    shutil.copytree(trained / "model", folder)
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n")
    classes = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model", "AutoTokenizer": [None, "code.Tokenizer"]}
    _changed_config(folder, model_type="mine", auto_map=classes)
    about = folder / "tokenizer_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "tokenizer_class": "Mine", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    if where == "evaluation":
        with pytest.raises(EvalError):
            Model("mine", str(folder)).check()
    else:
        text = mini.folder / "text.txt"
        text.write_text("bando kori")
        assert mini("--set", f"pretrain.{where}={folder}", "--data", str(text)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(folder) in error and "custom code" in error
    assert not asked and not (folder / "ran").exists()


def test_a_runs_folder_in_place_of_its_model_is_refused_with_a_hint(mini, trained, capsys):
    assert mini("--set", f"pretrain.model={trained}") == 2
    assert f'did you mean "{trained / "model"}"?' in capsys.readouterr().err
    assert mini("--set", "pretrain.model=./bert-bsae") == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_trained_model_brings_its_tokenizer(mini, trained, capsys):
    assert mini("--set", f"pretrain.model={trained / 'model'}", "--set", "pretrain.tokenizer=other") == 2
    assert "brings its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("importance", "message"), [("loss", "importance table: that of"), ("frequency", 'table of "loss"'), ("random", None)]
)
def test_the_log_says_what_becomes_of_the_table(trained, small_data, caplog, importance, message):
    run = job.load(settings(), [f"pretrain.model={trained / 'model'}", f"sctd.importance={importance}"])
    with caplog.at_level("INFO"):
        models.build_model(run, data.load(small_data))
    assert message in caplog.text if message else "table" not in caplog.text


@pytest.mark.parametrize(("pad", "message"), [(None, "no pad_token_id"), (1, "they must agree")])
def test_a_roberta_whose_padding_id_is_not_its_tokenizers_is_refused(mini, small_data, capsys, pad, message):
    tokenizer = data.load(small_data).tokenizer
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaForMaskedLM(RobertaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=1)).save_pretrained(mini.folder / "r")
    tokenizer.save_pretrained(mini.folder / "r")
    _changed_config(mini.folder / "r", pad_token_id=pad)
    assert mini("--set", f"pretrain.model={mini.folder / 'r'}") == 2
    assert message in capsys.readouterr().err


def test_an_exported_tokenizer_takes_rows_of_the_length_trained(mini, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    tokenizer.model_max_length = 16
    shutil.copytree(trained / "model", mini.folder / "short")
    tokenizer.save_pretrained(mini.folder / "short")
    assert mini("--set", f"pretrain.model={mini.folder / 'short'}", pretrain=FEW) == 0
    assert AutoTokenizer.from_pretrained(mini.folder / "run" / "model").model_max_length == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "sctd.intervall=3"], 'unknown key "intervall" in sctd; did you mean "interval"?'),
        (["--set", "zero_optimizaton.stage=2"], 'did you mean "zero_optimization"?'),
        (["--set", "pretrain.seq_length=64"], "32"),
        (["--set", "train_batch_size=7"], "divides 7"),
        (["--set", "train_batch_size=800"], "fewer than one batch"),
        (["--data", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--deepspeed_config", "/nowhere.json"], "no such configuration file"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_2(mini, capsys, change, message):
    assert mini(*change) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (mini.folder / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "output",
    [ROOT / "pretrain.py", ROOT / "pretrain.py" / "run", "/proc/self/run", "x" * 300, "a\0b"],
    ids=["file", "below a file", "no room", "too long", "NUL"],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(mini, capsys, output):
    for more in ((), ("--dry-run",)):
        assert mini("--output", str(output), *more, pretrain=FEW) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "the run cannot write there" in error and "choose another --output" in error


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def no_space_in_safetensors(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("owner", "name", "full", "file"),
    [
        (BertForMaskedLM, "save_pretrained", no_space, "model"),
        (BertForMaskedLM, "save_pretrained", no_space_in_safetensors, "model"),
        (BertTokenizer, "save_pretrained", no_space, "model"),
        (report, "json", SimpleNamespace(dumps=no_space), "report.json"),
        (Figure, "savefig", no_space, "report.png"),
        (os, "fsync", no_space, "metrics.jsonl"),
    ],
    ids=["model", "model in safetensors", "tokenizer", "report", "figure", "records"],
)
def test_a_full_disk_is_one_line_and_the_same_command_continues(mini, capsys, monkeypatch, owner, name, full, file):
    assert mini(output="whole", pretrain=FEW) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        # Only at the end: the checkpoints before it are written.
        finish = report.finish if file != "metrics.jsonl" else Metrics.flush
        where = (report, "finish") if file != "metrics.jsonl" else (Metrics, "flush")

        def fill_disk(*arguments):
            with patch.context() as full_disk:
                full_disk.setattr(owner, name, full)
                finish(*arguments)

        patch.setattr(*where, fill_disk)
        assert mini(pretrain=FEW) == 2
    error = capsys.readouterr().err
    run = mini.folder / "run"
    assert error.count("\n") == 1 and f"{run / file}: " in error and "No space left on device" in error
    assert not [path.name for path in run.iterdir() if "partial" in path.name]
    assert mini(pretrain=FEW) == 0
    assert_same_end(mini.folder / "whole", run)


def test_a_flipped_bit_in_the_training_data_is_noticed_at_every_start(mini, small_data, capsys, caplog):
    copy = shutil.copytree(small_data, mini.folder / "data")
    with caplog.at_level("INFO"):
        assert mini("--data", str(copy), pretrain=FEW) == 0
    assert re.search(r"MB are as they were built \(SHA-256, \d+\.\d s\)", caplog.text)
    for split in ("train", "validation"):
        (rows,) = (copy / split).glob("*.arrow")
        written = rows.read_bytes()
        for place in (len(written) // 2, len(written) - 1):
            rows.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
            for output in ("new", "run"):
                assert mini("--data", str(copy), output=output, pretrain=FEW) == 2
                error = capsys.readouterr().err
                assert f"{split}/{rows.name} has changed since it was built" in error and error.count("\n") == 1
        rows.write_bytes(written)


def test_help_names_every_option():
    command = [sys.executable, "pretrain.py", "--help"]
    wide = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, check=True)
    for option in ("--deepspeed_config", "--data", "--output", "--resume", "--set", "--allow-change", "--dry-run"):
        assert option in done.stdout


def test_small_data_has_the_epoch_that_the_tests_count_on(small_data):
    assert len(data.load(small_data).train) == EPOCH * settings()["train_batch_size"]
