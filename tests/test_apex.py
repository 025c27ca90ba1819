"""apex: each way of not having it has its own message, and a run uses what it asks for. A stand-in package takes its place."""

import json
import re
import shutil
import sys

import pytest
import torch
from torch import nn

import sctd_ds
from helpers.families import FAMILIES, build, rows
from helpers.runs import settings, write_settings
from sctd_ds import ConfigError, pretrain
from sctd_ds.integrations import apex
from sctd_ds.run import job, metrics

NORMALIZATION = """
import torch
class FusedLayerNorm(torch.nn.LayerNorm):
    calls = 0
    def forward(self, x):
        FusedLayerNorm.calls += 1
        return super().forward(x)
"""
# Arguments are those of apex's optimizers; the arithmetic is torch's.
OPTIMIZERS = """
import torch
class FusedAdam(torch.optim.AdamW):
    calls = 0
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    def step(self, closure=None):
        FusedAdam.calls += 1
        return super().step(closure)
class FusedLAMB(FusedAdam):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that stands before all others; no apex may be installed beside it for these tests to mean much."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("apex", "fused_layer_norm_cuda", "amp_C"):
            del sys.modules[name]


def nvidia(site, *extensions: str) -> None:
    """A Python-only build, and such of its extensions as are named."""
    init = {"apex/__init__": "", "apex/optimizers/__init__": OPTIMIZERS}
    site(**init, **{"apex/normalization/__init__": NORMALIZATION}, **dict.fromkeys(extensions, ""))


LAMB = {"type": "apex.FusedLAMB", "params": {"lr": 1e-3}}


@pytest.fixture
def without_apex(monkeypatch):
    find = apex.importlib.util.find_spec
    monkeypatch.setattr(apex.importlib.util, "find_spec", lambda name: None if name == "apex" else find(name))


def test_not_installed(without_apex):
    for part in ("normalization", "optimizers"):
        with pytest.raises(ConfigError, match="not installed"):
            apex.require(part)


@pytest.mark.parametrize("asking", [{"optimizer": LAMB}, {"pretrain": {"layer_norm": "apex"}}], ids=["optimizer", "norm"])
def test_a_run_that_asks_for_it_is_refused_before_anything_is_built(without_apex, asking):
    with pytest.raises(ConfigError, match="not installed"):
        job.load(settings(**asking))


def test_the_unrelated_package_of_that_name_is_not_even_imported(site):
    site(**{"apex/__init__": "raise ImportError('pyramid')", "apex/lib/__init__": ""})
    with pytest.raises(ValueError, match="not NVIDIA's"):
        apex.fuse_layer_norms(nn.LayerNorm(2))
    with pytest.raises(ValueError, match="not NVIDIA's"):
        job.load(settings(optimizer=LAMB))


def test_a_python_only_build(site):
    nvidia(site)
    with pytest.raises(ValueError, match="fused_layer_norm_cuda"):
        apex.require("normalization")
    with pytest.raises(ValueError, match="amp_C"):
        apex.require("optimizers")


def test_a_build_with_one_extension_only(site):
    nvidia(site, "amp_C")
    optimizer = apex.optimizer("apex.FusedLAMB", nn.Linear(2, 2).parameters(), {"lr": 0.5})
    assert type(optimizer).__module__ == "apex.optimizers" and optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="fused_layer_norm_cuda"):
        apex.fuse_layer_norms(nn.LayerNorm(2))


def test_layer_norms_are_replaced_over_the_same_parameters(site):
    nvidia(site, "fused_layer_norm_cuda")
    family = FAMILIES[0]
    plain, model = build(family), build(family)
    parameters = dict(model.named_parameters())
    assert apex.fuse_layer_norms(model) == 2 * 6 + 2  # two a layer, one in the embedding, one in the head
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    sctd_ds.convert(model, sctd_ds.ScTDConfig(keep_token_ids=[]))
    sctd_ds.convert(plain, sctd_ds.ScTDConfig(keep_token_ids=[]))
    _, kwargs = family.arguments(rows())
    assert torch.equal(model(**kwargs).loss, plain(**kwargs).loss)
    assert type(model.bert.embeddings.LayerNorm).calls > 0


# A run with one of its optimizers


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "apex.FusedSGD"}, 'optimizer.type="apex.FusedSGD" is unknown; did you mean "apex.Fused'),
        ({**LAMB, "params": {"lr": 1e-3, "max_coeff": 0.3}}, 'unknown key "max_coeff" in optimizer.params of apex.FusedLAMB'),
        ({**LAMB, "params": {"lr": "auto"}}, 'optimizer.params.lr is "auto"'),
    ],
)
def test_what_it_cannot_build_is_refused(site, optimizer, message):
    nvidia(site, "amp_C")
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.load(settings(optimizer=optimizer))


def test_deepspeed_does_not_get_the_block_and_a_checkpoint_records_it(site):
    nvidia(site, "amp_C")
    run = job.load(settings(optimizer=LAMB, zero_optimization={"stage": 0}))
    assert "optimizer" not in run.deepspeed and run.deepspeed["zero_allow_untested_optimizer"] and not run.notes
    assert run.deepspeed["scheduler"]["params"]["warmup_max_lr"] == 1e-3
    assert run.flat()["optimizer.type"] == "apex.FusedLAMB" and run.flat()["optimizer.params.lr"] == 1e-3
    assert "one for all of a rank's parameters" in job.load(settings(optimizer=LAMB)).notes[0]


def test_a_run_trains_with_it_and_continues(site, small_data, tmp_path, capsys):
    """With a stand-in for AdamW, the run is the one with AdamW, step for step; its probe and its checkpoints use it, too."""
    nvidia(site, "amp_C")
    params = {"lr": 2e-3, "weight_decay": 0.01}
    few = {"steps": 4, "validation_every": 0, "probe_steps": 1}
    built = {
        "torch": {"type": "AdamW", "params": {**params, "torch_adam": True}},
        "apex": {"type": "apex.FusedAdam", "params": params},
    }

    def run(name: str, *more: str) -> int:
        config = write_settings(tmp_path / f"{name}.json", optimizer=built[name], pretrain=few)
        command = ["--deepspeed_config", str(config), "--data", str(small_data), "--output", str(tmp_path / name)]
        return pretrain.run_and_report([*command, *more])

    def losses(name: str) -> list[float]:
        return [record["loss"] for record in metrics.read(tmp_path / name / "metrics.jsonl") if record["event"] == "train"]

    assert run("torch") == 0 and run("apex") == 0
    whole = losses("apex")
    assert losses("torch") == whole and len(whole) == 4
    stand_in = sys.modules["apex.optimizers"].FusedAdam
    assert stand_in.calls > 4  # the probe's steps are among them

    checkpoints = tmp_path / "apex" / "checkpoints"
    stored = json.loads((checkpoints / "step_00000002" / "settings.json").read_text())["settings"]
    assert stored["optimizer.type"] == "apex.FusedAdam" and stored["optimizer.params.weight_decay"] == 0.01
    for step in (3, 4):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    assert run("apex") == 0 and losses("apex") == whole
    assert run("apex", "--set", "optimizer.params.weight_decay=0.1") == 2
    assert "optimizer.params.weight_decay: 0.01 -> 0.1" in capsys.readouterr().err
