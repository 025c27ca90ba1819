"""The run's file: every shipped one loads, every typo is found, every impossible combination is named."""

import json
import random
import re
from pathlib import Path

import deepspeed
import pytest
from transformers import BertConfig

from helpers import ROOT
from helpers.runs import settings
from sctd_ds import ConfigError, ScTDConfig, config, deepspeed_json
from sctd_ds.run import job

FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_configurations_load(file, tmp_path, monkeypatch):
    pretrain = json.loads(file.read_text())["pretrain"]
    if file.stem == "adapt":  # its model stands on the Hub
        BertConfig().save_pretrained(tmp_path / pretrain["model"])
        monkeypatch.chdir(tmp_path)
    run = job.load(file, world_size=pretrain.get("stages", 1))
    assert (run.pretrain.trained_model is not None) == (file.stem == "adapt")
    assert run.global_batch == run.deepspeed["train_batch_size"]


@pytest.mark.parametrize("model", ["tiny", "base", "large"])
@pytest.mark.parametrize("baseline", ["dense", "token_drop"])
def test_baselines_differ_in_the_method_only(model, baseline):
    ours, theirs = (json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) for name in (model, f"{model}_{baseline}"))
    assert theirs.pop("sctd")["method"] == baseline and ours.pop("sctd")["method"] == "sctd"
    assert ours == theirs


def test_large_is_the_papers_recipe():
    run = job.load(ROOT / "ds_configs" / "large.json", world_size=8)
    assert (run.global_batch, run.pretrain.steps, run.pretrain.seq_length, run.pretrain.mlm_probability) == (
        1024,
        250_000,
        512,
        0.15,
    )
    assert (run.sctd.drop_ratio, run.sctd.interval, run.sctd.kl_weight) == (0.5, 10, 0.05)
    assert run.deepspeed["optimizer"]["params"]["lr"] == 2e-4 and run.deepspeed["zero_optimization"]["stage"] == 2
    assert json.loads((ROOT / "ds_configs" / "large.json").read_text())["fp16"]["enabled"]


def test_overrides_reach_any_key_and_parse_json():
    run = job.load(settings(), ["sctd.interval=20", "pretrain.model.num_hidden_layers=6", 'wandb={"enabled": false}'])
    assert (
        run.sctd.interval == 20
        and run.pretrain.model["num_hidden_layers"] == 6
        and run.deepspeed["wandb"] == {"enabled": False}
    )


def _paths(block, path=()):
    for key, value in block.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths(value, (*path, key))


def test_one_wrong_letter_anywhere_is_an_error_that_names_the_key():
    """Every key of a configuration with all blocks, each misspelt in several ways."""
    base = settings(fp16={"enabled": False, "loss_scale": 0}, csv_monitor={"enabled": False, "job_name": "x"})
    generator, seen = random.Random(0), 0
    for path in _paths(base):
        key = path[-1]
        for _ in range(4):
            at = generator.randrange(len(key))
            typo = key[:at] + generator.choice("abcdefghijklmnopqrstuvwxyz_") + key[at + generator.randrange(2) :]
            broken = json.loads(json.dumps(base))
            block = broken
            for part in path[:-1]:
                block = block[part]
            if typo in block:
                continue
            block[typo] = block.pop(key)
            with pytest.raises(ConfigError, match=re.escape(typo)) as error:
                job.load(broken)
            assert "did you mean" in str(error.value) or "known:" in str(error.value)
            seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sctd.drop_ratio=1.0", "less than 1"),
        ("sctd.drop_ratio=-0.1", "greater than or equal to 0"),
        ("sctd.interval=0", "greater than or equal to 1"),
        ("sctd.method=sctdd", "'token_drop'"),
        ("pretrain.model.num_hidden_layers=3", "at least 4"),
        ("pretrain.model.vocab_size=5", "comes from the tokenizer"),
        ("pretrain.model.max_position_embeddings=16", "smaller than"),
        ("gradient_accumulation_steps=3", "divides 8"),
        ("train_micro_batch_size_per_gpu=0", "at least 1"),
        ("gradient_clipping=auto", "nothing here resolves"),
        ("optimizer.type=AdmaW", 'did you mean "AdamW"'),
        ("scheduler.type=WarmupDecay", 'did you mean "WarmupDecayLR"'),
        ("scheduler.params.warmup_num_steps=14", "must be below"),
        ("zero_optimization.stage=3", "stage=3 is not supported"),
        ("zero_optimization.stage=7", "zero_optimization.stage=7"),
        ('pipeline={"stages": 2}', "stage=2"),
        ('progressive_layer_drop={"enabled": true}', "removed"),
        ('fp16={"enabled": "maybe"}', "fp16.enabled"),
        ("sctd=5", "must be a JSON object"),
        ("sctd.interval", "expected dotted.key=value"),
    ],
)
def test_what_cannot_work_is_named(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.load(settings(), [change])


def test_two_precisions_are_refused():
    with pytest.raises(ConfigError, match="choose one"):
        job.load(settings(fp16={"enabled": True}, bf16={"enabled": True}))


def test_fp16_falls_back_to_bf16_aloud_or_not_at_all(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    run = job.load(settings(fp16={"enabled": True}))
    assert run.deepspeed["bf16"] == {"enabled": True} and "fp16" not in run.deepspeed and "bf16 instead" in run.notes[0]
    with pytest.raises(ConfigError, match="has no fp16"):
        job.load(settings(fp16={"enabled": True}), ["pretrain.precision=strict"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, column 2"),
        ("[1]", "expected a JSON object"),
        ('{"sctd": {}, "sctd": {}}', "stands twice"),
        ("\xff", "read"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path, text, message):
    file = tmp_path / "broken.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        job.load(file)


def test_known_keys_are_those_deepspeed_reads():
    """Hold our list against the installed DeepSpeed: every constant that names a top-level key of its config."""
    sources = Path(deepspeed.__file__).parent
    text = (sources / "runtime" / "config.py").read_text()
    read_directly = set(re.findall(r'param_dict(?:\.get\(|\[)"([a-z_0-9]+)"', text)) | set(
        re.findall(r"param_dict(?:\.get\(|\[)'([a-z_0-9]+)'", text)
    )
    from deepspeed.runtime import constants

    named = set(re.findall(r"get_scalar_param\(\s*param_dict,\s*([A-Z_]+)", text)) | set(
        re.findall(r"([A-Z_]+) in param_dict\b(?!\[)", text)
    )
    by_name = {getattr(constants, name) for name in named if isinstance(getattr(constants, name, None), str)}
    assert len(by_name) > 15
    assert read_directly | by_name <= deepspeed_json.DEEPSPEED_KEYS


def test_method_block_stands_alone():
    assert ScTDConfig().interval == 10
    with pytest.raises(ValueError, match="did you mean"):
        ScTDConfig(intervall=3)


def test_differences_ignore_what_does_not_change_learning():
    old, new = {"sctd.interval": 4, "pretrain.log_every": 1}, {"sctd.interval": 5, "pretrain.log_every": 2}
    assert config.differences(old, new) == ["sctd.interval: 4 -> 5"]
    assert config.differences(old, new, ["sctd.interval"]) == []
