"""The run's file: every shipped one loads, every typo is found, every impossible combination is named."""

import json
import random
import re
from pathlib import Path

import deepspeed
import pytest
from transformers import BertConfig

from helpers import ROOT, mutations
from helpers.runs import settings, write_settings
from sctd_ds import ConfigError, ScTDConfig, config, deepspeed_json, pretrain
from sctd_ds.engine import checkpoint, ranks
from sctd_ds.run import job
from sctd_ds.run import settings as settings_module

FILES = sorted((ROOT / "ds_configs").glob("*.json"))


WSD = 'scheduler={"type": "transformers.warmup_stable_decay", "params": {%s}}'


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_configurations_load(file, tmp_path, monkeypatch):
    pretrain = json.loads(file.read_text())["pretrain"]
    if file.stem == "adapt":  # its model stands on the Hub
        BertConfig().save_pretrained(tmp_path / pretrain["model"])
        monkeypatch.chdir(tmp_path)
    run = job.load(file, world_size=pretrain.get("stages", 1))
    assert (run.pretrain.trained_model is not None) == (file.stem == "adapt")
    assert run.global_batch == run.deepspeed["train_batch_size"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize("baseline", ["dense", "token_drop"])
def test_baselines_differ_in_method_and_name_only(file, baseline):
    stages = json.loads(file.read_text())["pretrain"].get("stages", 1)
    run, other = (settings_module.load(file, world_size=stages, method=method) for method in (None, baseline))
    same = run.sctd.method == baseline
    assert (run.name, other.name) == (file.stem, file.stem if same else f"{file.stem}_{baseline}")
    changes = [] if same else [f"sctd.method: {run.sctd.method} -> {baseline}"]
    assert config.differences(run.flat(), other.flat(), ()) == changes


def test_the_tiny_run_fits_on_two_pipeline_stages():
    changes = ["pretrain.stages=2", "zero_optimization.stage=1", "gradient_accumulation_steps=4"]
    run = job.load(ROOT / "ds_configs" / "tiny.json", changes, world_size=2)
    assert (run.ranks, run.world_size, run.micro_batch, run.accumulation) == (2, 1, 64, 4)


def test_the_method_of_the_file_leaves_its_name(tmp_path):
    file = write_settings(tmp_path / "mini.json", sctd={"method": "dense"})
    assert job.load(file, method="dense").name == "mini"
    assert job.load(file, method="sctd").name == "mini_sctd"
    both = job.load(file, ["sctd.interval=3"], method="sctd")
    assert (both.sctd.method, both.sctd.interval) == ("sctd", 3)


def test_two_methods_on_the_command_line_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'--method dense, but --set makes sctd\.method "token_drop"'):
        job.load(settings(), ["sctd.method=token_drop"], method="dense")
    with pytest.raises(ConfigError, match=r"sctd\.method='fast'"):
        job.load(settings(), method="fast")


def test_a_baseline_has_a_folder_of_its_own(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_settings(tmp_path / "mini.json", pretrain={"steps": 2, "validation_every": 0})
    for more in ((), ("--method", "dense")):
        assert pretrain.main(["--deepspeed_config", str(file), "--data", str(small_data), *more]) == 0
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["mini", "mini_dense"]
    reports = [json.loads((tmp_path / "runs" / name / "report.json").read_text()) for name in ("mini", "mini_dense")]
    assert [report["method"] for report in reports] == ["sctd", "dense"]


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
        ("train_micro_batch_size_per_gpu=0", "greater than or equal to 1"),
        ("gradient_clipping=auto", "nothing here resolves"),
        ("optimizer.type=AdmaW", 'did you mean "AdamW"'),
        ("scheduler.type=WarmupDecay", 'did you mean "WarmupDecayLR"'),
        (r'scheduler.type="a\nb"', 'scheduler.type="a b" is unknown'),
        ("scheduler.params.warmup_num_steps=14", "must be below"),
        ("zero_optimization.stage=3", "stage=3 is not supported"),
        ("zero_optimization.stage=7", "zero_optimization.stage=7"),
        ('pipeline={"stages": 2}', "set pretrain.stages"),
        ("optimizer.params.weigth_decay=0.1", 'did you mean "weight_decay"'),
        ("optimizer=Adam", '"optimizer" must be a JSON object'),
        ('progressive_layer_drop={"enabled": true}', "removed"),
        ('fp16={"enabled": "maybe"}', "fp16.enabled"),
        ("sctd=5", "must be a JSON object"),
        ("sctd.interval", "expected dotted.key=value"),
        # DeepSpeed's smaller blocks
        ("activation_checkpointing.partition_activation=true", 'did you mean "partition_activations"'),
        ("data_types.grad_accum_dtyp=fp32", 'did you mean "grad_accum_dtype"'),
        ("flops_profiler.enbled=true", 'did you mean "enabled"'),
        ("comms_logger.verbos=true", 'did you mean "verbose"'),
        ("aio.block_sizes=1", 'did you mean "block_size"'),
        ("checkpoint.tag_validtion=Warn", 'did you mean "tag_validation"'),
        ("checkpoint.writer.tipe=fast", '"tipe" in checkpoint.writer; did you mean "type"'),
        ("torch_autocast.dtypes=fp16", 'did you mean "dtype"'),
        ("compile.deepcompil=true", 'did you mean "deepcompile"'),
        ("data_efficiency.data_sampling.num_epoch=3", 'did you mean "num_epochs"'),
        ("zero_optimization.offload_optimizer.devise=cpu", 'in zero_optimization.offload_optimizer; did you mean "device"'),
        ("zero_optimization.offload_optimizer.device=gpu", "zero_optimization.offload_optimizer.device='gpu'"),
        ("flops_profiler.profile_step=0", "greater than or equal to 1"),
        ("comms_logger.enabled=3", "comms_logger.enabled=3"),
        ("aio.overlap_events=1", "aio.overlap_events=1: expected true or false"),
        ("data_types.grad_accum_dtype=fp31", "'fp16', 'bf16' or 'fp32'"),
        ("timers.throughput=5", "timers.throughput=5"),
        ("communication_data_type=true", "communication_data_type=True"),
        ("steps_per_print=0", "greater than or equal to 1"),
        ("gradient_clipping=-1", "greater than or equal to 0"),
        ("gradient_clipping=1e999", "gradient_clipping=inf: expected a finite number"),
        ("dump_state=1", "dump_state=1: expected true or false"),
        # Parameters of the optimizer and the schedule
        ("optimizer.params=null", '"optimizer.params" must be a JSON object'),
        ("scheduler.params=5", '"scheduler.params" must be a JSON object'),
        ("optimizer.params.lr=fast", "optimizer.params.lr='fast'"),
        ("optimizer.params.lr=0", "greater than 0"),
        ("optimizer.params.lr=1e300", "without overflow"),
        ("optimizer.params.betas=[0.9]", "optimizer.params.betas"),
        ("optimizer.params.betas=[0.9, 1]", "less than 1"),
        ("optimizer.params.eps=1e30", "less than or equal to 1"),
        ("optimizer.params.weight_decay=-1", "greater than or equal to 0"),
        ("optimizer.params.fused=2", "optimizer.params.fused=2"),
        ("optimizer.params.differentiable=true", "optimizer.type=AdamW cannot be used (RuntimeError"),
        ('optimizer={"type": "LBFGS", "params": {"lr": 1}}', "ZeRO has not been tested"),
        ('optimizer={"type": "Adam", "params": {"amsgrad": true}}', "optimizer.params.amsgrad=True"),
        ("scheduler.params.warmup_type=linaer", "'log' or 'linear'"),
        ("scheduler.params.warmup_num_steps=1.5", "valid integer"),
        (WSD % '"num_warmup_steps": 4, "num_decay_steps": 11', "num_warmup_steps=4 + num_decay_steps=11 must not exceed"),
        (WSD % '"num_warmup_steps": 4', "scheduler.params.num_decay_steps is missing"),
        (WSD % '"num_warmup_steps": 4, "num_decay_stps": 2', 'did you mean "num_decay_steps"'),
        (WSD % '"num_warmup_steps": 4, "num_decay_steps": 2, "num_stable_steps": 8', "those that are left; remove it"),
        (WSD % '"num_warmup_steps": 4, "num_decay_steps": 2, "decay_type": "x"', "Unknown decay type: x"),
        ('scheduler={"type": "transformers.linear", "params": {"num_warmup_steps": 14}}', "be below num_training_steps=14"),
        ('scheduler={"type": "transformers.warmup_decay_stable"}', 'did you mean "transformers.warmup_stable_decay"'),
        ("scheduler.params={}", "scheduler.params.total_num_steps is missing"),
        ('scheduler={"type": "StepLR", "params": {"step_size": 2}}', "use one of LRRangeTest"),
        # Sizes of the model
        ("pretrain.model.hidden_size=0", "greater than or equal to 1"),
        ("pretrain.model.hidden_size=true", "pretrain.model.hidden_size=True: expected a number"),
        ("pretrain.model.num_attention_heads=3", "transformers cannot build it"),
        ("pretrain.model.hidden_act=gelo", "pretrain.model.hidden_act='gelo'"),
        ("pretrain.model.hidden_dropout_prob=-1", "greater than or equal to 0"),
        ("pretrain.model.layer_norm_eps=-1", "greater than or equal to 0"),
        ("pretrain.model.is_decoder=true", 'unknown key "is_decoder"'),
        ("pretrain.model.intermediate_size=1000000000000", "this machine has"),
        # Numbers, words, true and false are not each other, and keys stand once
        ("sctd.interval=true", "sctd.interval=True: expected a number"),
        ('sctd.interval="3"', "sctd.interval='3': expected a number"),
        ("sctd.shared_prefix=1", "sctd.shared_prefix=1: expected true or false"),
        ("sctd.document_mask=-1", "sctd.document_mask=-1: "),
        ("sctd.document_mask=auto", "sctd.document_mask='auto': "),
        ("sctd.keep_token_ids=[true]", "sctd.keep_token_ids=True: expected a number"),
        ("sctd.kl_weight=NaN", "sctd.kl_weight=nan: expected a finite number"),
        ("pretrain.seed=4294967296", "less than 4294967296"),
        ("pretrain.steps=1" + 20 * "0", "at most 64 bits"),
        ("pretrain.steps=1" + 5000 * "0", "4300 digits"),
        ("sctd=" + 30 * '{"a": ' + "1" + 30 * "}", "nested more than 20 deep"),
        ("sctd=" + 100_000 * "[" + 100_000 * "]", "recursion"),
        ('sctd={"interval": 3, "interval": 4}', '"interval" stands twice'),
    ],
)
def test_what_cannot_work_is_named(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.load(settings(), [change])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_damaged_configuration_is_loaded_or_refused_in_one_line(file, tmp_path):
    """80 kinds of damage to each file: never another exception, and never a second line."""
    settings = json.loads(file.read_text())
    settings["pretrain"].update({"model": "bert-base"} if file.stem == "adapt" else {})  # its model stands on the Hub
    stages = settings["pretrain"].get("stages", 1)
    outcomes = {True: 0, False: 0}
    for seed in range(80):
        config, change = mutations.mutated(settings, random.Random(f"{file.stem} {seed}"), changes=1 + seed % 2)
        damaged = tmp_path / "damaged.json"
        damaged.write_text(mutations.as_text(config))
        try:
            job.load(damaged, world_size=stages)
            outcomes[True] += 1
        except ConfigError as error:
            outcomes[False] += 1
            assert "\n" not in str(error) and 10 < len(str(error)) < 1200, f"{change}: {error}"
        except Exception as error:
            raise AssertionError(f"{change}: {type(error).__name__}: {error}") from error
    assert min(outcomes.values()) > 5, outcomes


def test_two_precisions_are_refused():
    with pytest.raises(ConfigError, match="both true; keep one"):
        job.load(settings(fp16={"enabled": True}, bf16={"enabled": True}))


def test_fp16_falls_back_to_bf16_aloud(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    run = job.load(settings(fp16={"enabled": True}))
    assert run.deepspeed["bf16"] == {"enabled": True} and "fp16" not in run.deepspeed and "bf16 instead" in run.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, column 2"),
        ("[1]", "expected a JSON object"),
        ('{"sctd": {}, "sctd": {}}', "broken.json: .*stands twice"),
        ('{"gradient_clipping": NaN}', "broken.json: gradient_clipping=nan"),
        ('{"optimizer": {"params": {"betas": [0.9, 1e999]}}}', "optimizer.params.betas=inf"),
        (100_000 * "[" + 100_000 * "]", "recursion"),
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
    assert config.differences(old, new, config.MAY_DIFFER_ON_RESUME | {"sctd.interval"}) == []
    assert config.differences({"wandb.enabled": True}, {"wandb.team": "x", "wandb_team": "x"}) == ["wandb_team: unset -> x"]


def test_what_may_differ_is_more_from_a_table_to_a_resumed_run_to_a_new_layout():
    assert config.MAY_DIFFER_IN_TABLE < config.MAY_DIFFER_ON_RESUME < config.MAY_DIFFER_ON_START
    fields = {f"{block.block}.{field}" for block in (ScTDConfig, config.PretrainConfig) for field in block.model_fields}
    own = {key for key in config.MAY_DIFFER_ON_START if key.startswith(("sctd.", "pretrain."))}
    others = {key.partition(".")[0] for key in config.MAY_DIFFER_ON_START - own}
    assert own <= fields and others <= deepspeed_json.DEEPSPEED_KEYS


def test_a_checkpoint_from_before_a_key_existed_did_what_its_default_does_or_cannot_change():
    new = {"sctd.dense_start": 0, "sctd.dense_finish": 0.1}
    assert config.differences({}, new) == ["sctd.dense_finish: 0 -> 0.1"]
    defaults = {**ScTDConfig().model_dump(), **config.PretrainConfig().model_dump()}
    assert {key for key, value in config.NEW_KEYS.items() if defaults[key.partition(".")[2]] != value} == config.FIXED_KEYS


def test_the_method_counts_the_steps_of_the_run():
    run = job.load(settings(sctd={"dense_start": 0.5}))
    assert run.sctd.total_steps == run.pretrain.steps == 14 and "sctd.total_steps" not in run.flat()
    with pytest.raises(ConfigError, match=re.escape("sctd.total_steps=5, but pretrain.steps=14: remove sctd.total_steps")):
        job.load(settings(sctd={"total_steps": 5}))
    with pytest.raises(ConfigError, match="make all 14 steps dense"):
        job.load(settings(sctd={"dense_start": 14}))


# Keys that an earlier version had


@pytest.mark.parametrize("key", config.REMOVED_KEYS)
def test_a_removed_key_is_an_error_that_says_what_to_do(key):
    block, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=f"{key} was removed: .*; remove the key"):
        job.load(settings(**{block: {name: "x"}}))
    of_block = {"sctd": ScTDConfig, "pretrain": config.PretrainConfig}[block]
    with pytest.raises(ConfigError, match=f"{key} was removed: .*; remove the key"):
        of_block(**{name: "x"})


def test_the_removed_align_on_says_what_the_kl_compares():
    with pytest.raises(ConfigError, match=r"sctd.align_on was removed: the KL compares the \[CLS\] states; remove the key"):
        ScTDConfig(align_on="cls")


# What the version before wrote into a checkpoint beside the keys of today, at its defaults.
OLD_DEFAULTS = {
    "sctd.align_on": "cls",
    "sctd.kl_reduction": "labels",
    "pretrain.pad_vocab_to": 64,
    "pretrain.precision": "auto",
    "pretrain.output": "runs/{name}",
}


@pytest.fixture
def old_checkpoint(tmp_path):
    """The settings of a checkpoint of the version before, and today's configuration of the same run."""
    run = job.load(settings())

    def write(**changes) -> tuple[Path, dict]:
        stored = {**run.flat(), **OLD_DEFAULTS, **changes}
        content = {"settings": stored, "world_size": 1, "step": 3}
        (tmp_path / "settings.json").write_text(json.dumps(content))
        return tmp_path, run.flat()

    ranks.init_distributed()
    return write


def test_a_checkpoint_of_the_version_before_is_accepted(old_checkpoint):
    assert set(OLD_DEFAULTS) == set(config.REMOVED_KEYS)
    checkpoint.check(*old_checkpoint(), steps=14)
    harmless = {"pretrain.precision": "strict", "pretrain.output": "elsewhere"}
    checkpoint.check(*old_checkpoint(**harmless), steps=14)


@pytest.mark.parametrize(
    ("key", "value"), [("sctd.align_on", "mean"), ("sctd.kl_reduction", "mean"), ("pretrain.pad_vocab_to", 1)]
)
def test_a_checkpoint_that_was_trained_otherwise_is_refused_in_words(old_checkpoint, key, value):
    folder, today = old_checkpoint(**{key: value})
    always = OLD_DEFAULTS[key]
    with pytest.raises(checkpoint.CheckpointError, match=f"{key}: {value} -> removed, now always {always}"):
        checkpoint.check(folder, today, steps=14)
    checkpoint.check(folder, today, (key,), steps=14)  # --allow-change
