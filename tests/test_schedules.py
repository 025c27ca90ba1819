"""Learning-rate schedules: those of transformers beside transformers itself, and what a run makes of their settings."""

import json
import re

import pytest
import torch
import transformers
from torch import nn

from helpers import ROOT
from helpers.runs import settings
from sctd_ds.config import ConfigError
from sctd_ds.deepspeed_schema import TRANSFORMERS_SCHEDULES
from sctd_ds.integrations import schedules
from sctd_ds.run import control, job
from test_metrics import SHAPE

MORE = {"warmup_stable_decay": {"num_decay_steps": 3}, "cosine_with_min_lr": {"min_lr": 1e-4}}
"""Parameters that a schedule needs beside the length of the warm-up."""
MORE["cosine_warmup_with_min_lr"] = MORE["cosine_with_min_lr"]


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates], lr=rates[0])


def block(kind: str, **params: object) -> dict:
    return {"type": kind, "params": params}


def load(kind: str, *overrides: str, steps: int = 14, **params: object):
    return job.load({**settings(pretrain={"steps": steps}), "scheduler": block(kind, **params)}, overrides)


@pytest.mark.parametrize("kind", TRANSFORMERS_SCHEDULES)
def test_rates_are_those_of_transformers(kind):
    """Of two groups of parameters, step by step; and after a resume in a run with another peak."""
    name = kind.removeprefix("transformers.")
    run = load(kind, num_warmup_steps=4, **MORE.get(name, {}))
    build = schedules.of(run.transformers_schedule)
    ours, theirs = optimizer(0.1, 0.02), optimizer(0.1, 0.02)
    schedule = build(ours)
    length = {} if name in ("constant_with_warmup", "inverse_sqrt") else {"num_training_steps": 14}
    told = transformers.get_scheduler(name, theirs, 4, **length, scheduler_specific_kwargs=MORE.get(name))
    rates = []
    for _ in range(16):
        assert schedule.get_last_lr() == pytest.approx(told.get_last_lr(), rel=1e-12)
        rates.append(schedule.get_last_lr())
        for taken in (ours, theirs, schedule, told):
            taken.step()
    assert len(set(map(tuple, rates))) > 4
    if name in MORE and "min_lr" in MORE[name]:  # not a multiple of the peak
        return
    resumed = build(optimizer(0.2, 0.04))
    resumed.load_state_dict({"last_batch_iteration": 8})
    resumed.step(resumed.last_batch_iteration)
    assert resumed.get_last_lr() == pytest.approx([2 * rate for rate in rates[9]])


def test_deepspeed_counts_steps_alike():
    """So a run may start from a checkpoint of a run with the other library's schedule."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    trunk = optimizer(0.1)
    constant = WarmupLR(trunk, warmup_max_lr=0.1, warmup_num_steps=2)
    for _ in range(11):
        constant.step()
    branch = optimizer(0.1)
    run = load("transformers.warmup_stable_decay", num_warmup_steps=2, num_decay_steps=4, decay_type="linear")
    decay = schedules.of(run.transformers_schedule)(branch)
    decay.load_state_dict(constant.state_dict())
    decay.step(decay.last_batch_iteration)
    assert decay.get_last_lr() == pytest.approx([0.075])  # 11 steps: 10 before the decay, and one of four


@pytest.mark.parametrize(
    ("kind", "written", "resolved", "follow"),
    [
        ("WarmupCosineLR", {"warmup_num_steps": 5, "total_num_steps": "auto"}, (5, 100), "total_num_steps"),
        ("WarmupDecayLR", {"warmup_num_steps": 0.06, "total_num_steps": "auto"}, (6, 100), "total_num_steps warmup_num_steps"),
        ("WarmupDecayLR", {"warmup_num_steps": 0.06, "total_num_steps": 50}, (3, 50), ""),
        ("WarmupLR", {"warmup_num_steps": 0.001}, (1,), "warmup_num_steps"),
        ("transformers.cosine", {"num_warmup_steps": 0}, (0, 100), "num_training_steps"),
        ("transformers.linear", {"num_warmup_steps": 0.1, "num_training_steps": 40}, (4, 40), ""),
        (
            "transformers.warmup_stable_decay",
            {"num_warmup_steps": 5, "num_decay_steps": 0.2, "num_training_steps": "auto"},
            (5, 20, 100),
            "num_decay_steps num_training_steps",
        ),
    ],
)
def test_lengths_and_shares_follow_from_the_run(kind, written, resolved, follow):
    run = load(kind, steps=100, **written)
    flat = run.flat()
    keys = [*written, *({"num_training_steps"} - written.keys() if "transformers" in kind else ())]
    assert tuple(flat[f"scheduler.params.{key}"] for key in keys) == resolved
    assert run.from_steps == {f"scheduler.params.{key}" for key in follow.split()}
    assert flat["scheduler.type"] == kind and ("scheduler" in run.deepspeed) == (not kind.startswith("transformers"))


def test_the_schedules_of_the_docs_load():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    blocks = re.findall(r'^\|.*`(\{"type": .*\})` \|$', text, flags=re.MULTILINE)
    assert len(blocks) == 4
    for written in blocks:
        assert job.load({**settings(pretrain={"steps": 250_000}), "scheduler": json.loads(written)})


def test_a_schedule_changes_by_set():
    run = load("transformers.warmup_stable_decay", "scheduler.params.num_decay_steps=3", num_warmup_steps=2, num_decay_steps=9)
    assert run.transformers_schedule["params"]["num_decay_steps"] == 3


@pytest.mark.parametrize("decay", [100, 950])
def test_the_control_of_a_run_has_its_schedule(decay):
    """Of its own length; without stable steps the whole of the warm-up stays."""
    run = load("transformers.warmup_stable_decay", steps=1000, num_warmup_steps=50, num_decay_steps=decay)
    dense = job.load(control.equal_compute(run, SHAPE))
    steps, params = dense.pretrain.steps, dense.transformers_schedule["params"]
    assert steps < 1000 and params["num_training_steps"] == steps and params["num_warmup_steps"] == 50
    assert params["num_decay_steps"] == (round(decay * steps / 1000) if decay == 100 else steps - 50)


@pytest.mark.parametrize(
    ("pretrain", "sctd", "message"),
    [
        ({"early_stopping": 2, "validation_every": 0}, {}, "pretrain.validation_every is 0"),
        ({"early_stopping": 2}, {"dense_finish": 2}, "never comes to its dense steps"),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(pretrain, sctd, message):
    with pytest.raises(ConfigError, match=message):
        job.load(settings(pretrain=pretrain, sctd=sctd))


def test_early_stopping_with_a_decay_is_warned_about_and_not_part_of_a_control():
    run = job.load(settings(pretrain={"early_stopping": 2}))
    assert "misses the end of the decay" in run.notes[-1]
    assert "early_stopping" not in control.equal_compute(run, SHAPE)["pretrain"]
    assert not job.load({**settings(pretrain={"early_stopping": 2}), "scheduler": block("WarmupLR")}).notes
