"""The doctor: its findings are what DeepSpeed really does, and what it writes is a configuration that works."""

import json
import re
import subprocess
import sys

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import nn

import sctd_ds
from helpers import ROOT
from sctd_ds import deepspeed_json, doctor
from sctd_ds.run import settings

SPARSE = {"mode": "fixed", "block": 16, "attention": "bidirectional"}
LAMB = {"lr": 11e-3, "weight_decay": 0.01, "bias_correction": False, "max_coeff": 0.3, "min_coeff": 0.01}
TIMER = {"throughput": {"enabled": False}}
PLAIN = {"train_batch_size": 8, "timers": TIMER, "sctd": {}}

# As published recipes have them: (blocks, what the doctor finds as kind and key, what the repaired configuration holds)
CASES = {
    "bing_bert": (
        {"prescale_gradients": False, "optimizer": {"type": "Lamb", "params": LAMB}, "sparse_attention": SPARSE},
        [("refused", "sparse_attention")],
        {"optimizer": {"type": "Lamb", "params": LAMB}, "sparse_attention": None},
    ),
    "fp32 sums in a pipeline": (
        {
            "data_types": {"grad_accum_dtype": "fp32"},
            "fp16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "pretrain": {"stages": 2},
        },
        [("conflict", "data_types.grad_accum_dtype")],
        {"data_types": {}},
    ),
    "throughput timer": (
        {"timers": {"throughput": {"synchronized": True}}},
        [("warning", "timers.throughput")],
        {"timers": {"throughput": {"synchronized": True, "enabled": False}}},
    ),
    "layer-drop": (
        {"progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.001}},
        [("refused", "progressive_layer_drop")],
        {"progressive_layer_drop": None},
    ),
    "1-bit LAMB": (
        {"optimizer": {"type": "OneBitLamb", "params": {**LAMB, "freeze_step": 1000, "cuda_aware": False}}},
        [("refused", "optimizer.type")],
        {"optimizer": {"type": "Lamb", "params": LAMB}},
    ),
    "0/1 Adam": (
        {"optimizer": {"type": "ZeroOneAdam", "params": {"lr": 1e-3, "var_freeze_step": 5}}},
        [("refused", "optimizer.type")],
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}},
    ),
    "apex amp": (
        {"amp": {"enabled": True, "opt_level": "O2"}},
        [("refused", "amp")],
        {"amp": None, "fp16": {"enabled": True}},
    ),
    "apex amp beside bf16": (
        {"amp": {"enabled": True}, "bf16": {"enabled": True}},
        [("refused", "amp")],
        {"amp": None, "bf16": {"enabled": True}, "fp16": None},
    ),
    "curriculum": (
        {"curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"}},
        [("refused", "curriculum_learning")],
        {"curriculum_learning": None},
    ),
    "elastic": (
        {"train_batch_size": None, "elasticity": {"enabled": True, "max_train_batch_size": 2000}},
        [("refused", "elasticity")],
        {"elasticity": None, "train_batch_size": 2000},
    ),
    "misspelt": (
        {"gradient_clipp1ng": 1.0, "zero_optimizaton": {"stge": 2}},
        [("ignored", "gradient_clipp1ng"), ("ignored", "zero_optimizaton")],
        {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}},
    ),
    "unknown": ({"my_own_notes": "x"}, [("ignored", "my_own_notes")], {"my_own_notes": None}),
    "misspelt inside": (
        {"fp16": {"enable": True}, "sctd": {"intervall": 5}},
        [("refused", "sctd.intervall"), ("refused", "fp16.enable")],
        {"fp16": {"enabled": True}, "sctd": {"interval": 5}},
    ),
    "ZeRO of 2019": ({"zero_optimization": True}, [("deprecated", "zero_optimization")], {"zero_optimization": {"stage": 1}}),
    "ZeRO-3": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "mics_shard_size": 4}},
        [("refused", "zero_optimization.mics_shard_size"), ("conflict", "zero_optimization.stage")],
        {"zero_optimization": {"stage": 2}},
    ),
    "offload": (
        {"zero_optimization": {"stage": 1, "cpu_offload": True}},
        [("deprecated", "zero_optimization.cpu_offload")],
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    ),
    "clipping in the optimizer": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "max_grad_norm": 0.4}}},
        [("refused", "optimizer.params.max_grad_norm")],
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "gradient_clipping": 0.4},
    ),
    "random-LTD": (
        {"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": {"enabled": True}}}},
        [("warning", "data_efficiency.data_routing")],
        {"data_efficiency": {"enabled": True, "data_routing": {"enabled": False, "random_ltd": {"enabled": False}}}},
    ),
    "sequence parallel": ({"sequence_parallel_size": 2}, [("conflict", "sequence_parallel_size")], {}),
    "no method": ({"sctd": None}, [("missing", "sctd")], {}),
    "keys of an earlier version": (
        {"sctd": {"align_on": "cls", "interval": 5}, "pretrain": {"output": "here", "steps": 9}},
        [("refused", "sctd.align_on"), ("refused", "pretrain.output")],
        {"sctd": {"interval": 5}, "pretrain": {"steps": 9}},
    ),
    "misspelt learning rate": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weigth_decay": 0.1}}},
        [("refused", "optimizer.params.weigth_decay")],
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}},
    ),
    "a pipeline with ZeRO-2": (
        {"pipeline": {"partition": "uniform"}, "zero_optimization": {"stage": 2, "overlap_comm": True}},
        [("conflict", "zero_optimization.stage")],
        {"zero_optimization": {"stage": 1, "overlap_comm": True}},
    ),
    "a pipeline that clips by one stage": (
        {"pretrain": {"stages": 2}, "zero_optimization": {"stage": 0}},
        [("conflict", "zero_optimization.stage")],
        {"zero_optimization": {"stage": 1}},
    ),
}


def configuration(blocks: dict) -> dict:
    return {key: value for key, value in {**PLAIN, **blocks}.items() if value is not None}


@pytest.mark.parametrize("name", CASES)
def test_finds_and_repairs(name):
    blocks, found, repaired = CASES[name]
    raw = configuration(blocks)
    before = json.dumps(raw)
    assert [(finding.kind, finding.key) for finding in deepspeed_json.diagnose(raw)] == found
    config, left = deepspeed_json.repair(raw)
    assert json.dumps(raw) == before and left == []
    assert {key: config.get(key) for key in repaired} == repaired
    assert deepspeed_json.diagnose(config) == []
    sctd_ds.ScTDConfig(**config["sctd"])
    DeepSpeedConfig({key: value for key, value in config.items() if key != "sctd"})


def build_engine(raw: dict) -> None:
    model = nn.Linear(2, 2)
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config=raw)


REFUSED_BY_DEEPSPEED = {
    name: next(key for kind, key in found if kind == "refused" and not key.startswith(("sctd", "pretrain")))
    for name, (_, found, _) in CASES.items()
    if any(kind == "refused" and not key.startswith(("sctd", "pretrain")) for kind, key in found)
}


@pytest.mark.parametrize("name", REFUSED_BY_DEEPSPEED)
def test_what_is_called_refused_is_refused_by_deepspeed(name):
    blocks, key = CASES[name][0], REFUSED_BY_DEEPSPEED[name]
    word = blocks["optimizer"]["type"] if key == "optimizer.type" else key.rpartition(".")[2]
    with pytest.raises((DeepSpeedConfigError, ValueError, AssertionError, TypeError), match=f"(?i){word.replace('_', '.')}"):
        build_engine(configuration(blocks))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if set(dict(case[1])) & {"ignored", "deprecated"}])
def test_what_is_called_ignored_or_deprecated_is_accepted_by_deepspeed(name):
    optimizer = {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}}
    build_engine(configuration({**CASES[name][0], "optimizer": optimizer, "zero_force_ds_cpu_optimizer": False}))


@pytest.mark.parametrize(
    ("blocks", "key", "words"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16", "keep one"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, "optimizer.params.lr", "Trainer"),
        ({"optimizer": {"type": "AdmaW"}}, "optimizer.type", 'did you mean "AdamW"?'),
        ({"optimizer": {"type": "apex.FusedLAMB"}}, "optimizer.type", "initialize(optimizer=...)"),
        ({"scheduler": {"type": "transformers.cosine"}}, "scheduler.type", "initialize(lr_scheduler=...)"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0.1}}},
            "scheduler.params.warmup_num_steps",
            "a number of steps",
        ),
        ({"pipeline": {"partition": "uniform"}, "pretrain": {}}, "pipeline", "set pretrain.stages"),
        ({"sctd": {"interval": 0}}, "sctd", "correct the value"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage", "correct the value"),
    ],
)
def test_what_needs_a_decision_is_left_to_the_user(blocks, key, words):
    raw = configuration(blocks)
    config, left = deepspeed_json.repair(raw)
    assert config == raw
    assert [key in finding.key and words in finding.remedy for finding in left] == [True], left


def first_that_refuses(raw: dict, pipeline: bool | None = None) -> deepspeed_json.Finding | None:
    found = deepspeed_json.diagnose(raw, pipeline)
    return next((finding for finding in found if finding.kind in deepspeed_json.REFUSING), None)


@pytest.mark.parametrize("name", CASES)
def test_loading_a_run_raises_the_first_that_refuses(name):
    raw = {"pretrain": {}, **configuration(CASES[name][0])}
    first = first_that_refuses(raw)
    if first is None:
        assert settings.load(raw).global_batch == 8
    else:
        with pytest.raises(sctd_ds.ConfigError, match=re.escape(str(first))):
            settings.load(raw, world_size=2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "pretrain" not in case[0]])
def test_initialize_raises_the_first_that_refuses(name):
    raw = configuration(CASES[name][0])
    first = first_that_refuses(raw, pipeline=False)
    model = nn.Linear(2, 2)  # not one that sctd_ds converts: what is not refused before gets as far as that
    with pytest.raises(ValueError, match="Linear|sctd_config=" if first is None else re.escape(str(first))):
        sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=raw)


def test_initialize_looks_past_the_blocks_that_arguments_replace():
    raw = configuration({"optimizer": {"type": "OneBitAdam"}, "scheduler": {"type": "Own"}, "pretrain": {"output": "x"}})
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="OneBitAdam"):
        sctd_ds.initialize(model=model, config=raw, lr_scheduler=lambda optimizer: None)
    with pytest.raises(ValueError, match="Own"):
        sctd_ds.initialize(None, model, optimizer, config=raw)
    with pytest.raises(ValueError, match="Linear"):
        sctd_ds.initialize(None, model, optimizer, config=raw, lr_scheduler=lambda optimizer: None)


def test_findings_come_in_the_order_of_the_file():
    raw = {"sparse_attention": {}, "train_batch_size": 8, "elasticity": {}, "amp": {}, "timers": TIMER}
    assert [finding.key for finding in deepspeed_json.diagnose(raw)] == ["sparse_attention", "elasticity", "amp", "sctd"]


# The command


def call_doctor(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sctd_ds.doctor", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_reports_writes_and_spares_what_is_there(tmp_path):
    recipe, ready = tmp_path / "lamb.json", tmp_path / "ready.json"
    recipe.write_text(json.dumps({"train_batch_size": 8, "sparse_attention": SPARSE}))
    ready.write_text(json.dumps(PLAIN))
    before = recipe.read_text()
    report = call_doctor(recipe, ready)
    assert report.returncode == 1
    assert "lamb.json: 3 to do" in report.stdout and "ready.json: ready" in report.stdout
    assert "sparse_attention has been removed from DeepSpeed" in report.stdout and "-> remove it" in report.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lamb.json", "ready.json"]

    assert call_doctor(recipe, "--write").returncode == 0
    written = tmp_path / "lamb.sctd.json"
    assert recipe.read_text() == before
    assert json.loads(written.read_text())["sctd"]["method"] == "sctd"
    assert json.loads(written.read_text())["timers"] == TIMER
    written.write_text("edited")
    again = call_doctor(recipe, "--write")
    assert again.returncode == 2 and "is there already" in again.stderr and written.read_text() == "edited"


def test_the_command_leaves_decisions_open(tmp_path, capsys):
    path = tmp_path / "both.json"
    path.write_text(json.dumps({**PLAIN, "fp16": {"enabled": True}, "bf16": {"enabled": True}, "amp": {}}))
    assert doctor.main([str(path), "--write"]) == 1
    assert "keep one of them (by hand)" in (text := capsys.readouterr().out) and "1 to do by hand" in text
    assert "amp" not in json.loads((tmp_path / "both.sctd.json").read_text())


@pytest.mark.parametrize("content", ['{"train_batch_size": CONFIG_BATCH_SIZE}', "[]", None])
def test_files_that_cannot_be_read(tmp_path, capsys, content):
    """Megatron's templates hold placeholders until their script fills them in."""
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert doctor.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err
