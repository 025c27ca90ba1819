"""The table of architectures, and ModernBERT through every door: recipe, tokenizer, engine, Trainer, evaluation."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

import sctd_ds
from helpers.bert import small_bert, small_modernbert
from helpers.runs import settings, write_settings
from sctd_ds import ConfigError, compare, data, pretrain
from sctd_ds.adapters import ADAPTERS, huggingface
from sctd_ds.adapters.architectures import ARCHITECTURES, PRESETS
from sctd_ds.config import differences
from sctd_ds.eval import analysis, finetune
from sctd_ds.eval.store import Model
from sctd_ds.eval.tasks import TASKS
from sctd_ds.integrations.export import read_importance
from sctd_ds.run import job, validation
from sctd_ds.run import models as run_models

TINY = {**settings()["pretrain"]["model"], "model_type": "modernbert", "local_attention": 8}


# The table


def test_rows_name_a_family_and_a_configuration_that_exist():
    for kind, row in ARCHITECTURES.items():
        known = transformers.AutoConfig.for_model(kind)
        assert row.adapter in ADAPTERS and kind in transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        # ModernBERT's has three older keys that it turns into others.
        assert {key for key in row.keys if not hasattr(known, key)} <= {
            "global_attn_every_n_layers",
            "global_rope_theta",
            "local_rope_theta",
        }


@pytest.mark.parametrize(
    ("preset", "vocabulary", "millions"),
    [
        ("bert-base", 30522, 109.5),
        ("bert-large", 30522, 335.2),
        ("modernbert-base", 50368, 149.7),
        ("modernbert-large", 50368, 395.9),
    ],
)
def test_presets_have_the_parameters_of_the_released_models(preset, vocabulary, millions):
    config = run_models.model_config(job.load(settings(pretrain={"model": preset})).pretrain)
    config.vocab_size = vocabulary
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    if preset.startswith("modern"):
        assert config.to_dict() == transformers.ModernBertConfig(**PRESETS[preset]).to_dict()
        assert (config.sliding_window, config.layer_types[:4].count("full_attention")) == (64, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "modernbrt"}, 'pretrain.model.model_type=\'modernbrt\': a new model is of type "bert" or "modernbert"'),
        ({"model_type": "roberta"}, 'a new model is of type "bert" or "modernbert"'),
        ({"model_type": 3}, "pretrain.model.model_type=3"),
        ({**TINY, "hidden_act": "gelu"}, 'unknown key "hidden_act" in pretrain.model; did you mean "hidden_activation"?'),
        ({**TINY, "hidden_activation": "gelo"}, "pretrain.model.hidden_activation='gelo'"),
        ({**TINY, "layer_types": ["full_attention"]}, "transformers cannot build it"),
        ({**TINY, "layer_types": 4 * ["local"]}, "pretrain.model.layer_types"),
        ({**TINY, "num_attention_heads": 5}, "transformers cannot build it"),
        ({**TINY, "max_position_embeddings": 16}, "max_position_embeddings=16 is smaller than pretrain.seq_length=32"),
        ({**TINY, "num_hidden_layers": 3}, "at least 4"),
    ],
)
def test_a_new_model_that_cannot_be_is_named(model, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.load(settings(pretrain={"model": model}))


def test_what_an_architecture_lacks_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"the norms of pretrain\.model have none"):
        job.load(settings(pretrain={"model": TINY, "layer_norm": "apex"}))
    roberta = sctd_ds.convert(transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=64, num_hidden_layers=4)))
    with pytest.raises(ConfigError, match=r"from BertForMaskedLM or ModernBertForMaskedLM, not from RobertaForMaskedLM"):
        sctd_ds.Pipeline(roberta, stages=1)


# Parameter groups


@pytest.mark.parametrize("build", [small_bert, small_modernbert])
def test_norms_and_biases_do_not_decay(build):
    run, model = job.load(settings()), build()
    matrices, others = run_models.parameter_groups(run, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in others["params"]} == {
        name for name in names.values() if name.endswith(".bias") or "norm" in name.lower()
    }
    assert others["weight_decay"] == 0 and "weight_decay" not in matrices
    assert len(matrices["params"]) + len(others["params"]) == len(names)
    (whole,) = run_models.parameter_groups(job.load(settings(), ["pretrain.decay_all=true"]), model)
    assert whole == {"params": list(model.parameters())}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weight_decay_alone_moves_matrices_alone(stage):
    """Without a gradient nothing else is left of AdamW's step."""
    blocks = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": stage}}
    blocks["optimizer"] = {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.5, "torch_adam": True}}
    run, model = job.load(settings(**blocks)), small_bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = {key: value for key, value in run.deepspeed.items() if key != "scheduler"}
    groups = run_models.parameter_groups(run, model)
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=groups, config=config, sctd_config={"keep_token_ids": [0]})
    ids = torch.arange(5, 13).repeat(2, 1)
    engine.backward(0.0 * engine(input_ids=ids, labels=torch.where(ids == 7, ids, -100)).loss)
    engine.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.75 if parameter.dim() > 1 else 1)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_a_run_that_decayed_all_parameters_goes_on_only_so(small_data, tmp_path, capsys):
    def run(*more):
        file = write_settings(tmp_path / "mini.json", pretrain={"steps": 2, "validation_every": 0})
        where = ["--deepspeed_config", str(file), "--data", str(small_data), "--output", str(tmp_path / "run")]
        return pretrain.run_and_report([*where, *more])

    assert run("--set", "pretrain.decay_all=true") == 0
    for more in ((), ("--allow-change", "pretrain.decay_all")):
        assert run(*more) == 2
        error = capsys.readouterr().err
        assert "pretrain.decay_all: True -> False (with which its optimizer cannot go on; no --allow-change helps)" in error
    before = {key: value for key, value in job.load(settings()).flat().items() if key != "pretrain.decay_all"}
    assert "pretrain.decay_all: True -> False" in differences(before, job.load(settings()).flat())[0]  # of before the key


# Mask rates


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3])
def test_every_run_is_judged_at_15_percent_masks(small_data, rate):
    """Also one that trains with fewer labels per row than it is judged at."""
    run, packed = job.load(settings(pretrain={"mlm_probability": rate})), data.load(small_data)
    model = run_models.build_model(run, packed)
    _, batches = job.make_batches(run, packed, rank=0)
    found = validation.judge(model, batches, rate)
    assert ("loss_15" in found) == (rate != 0.15)
    plain = sctd_ds.revert(model).eval()
    losses, labels = 0.0, 0
    with torch.no_grad():
        for batch in batches(0.15):
            count = (batch["labels"] != -100).sum().item()
            losses, labels = losses + plain(**batch).loss.item() * count, labels + count
    assert compare.common_loss(found) == pytest.approx(losses / labels, rel=1e-5)


# The engine


def test_rotary_frequencies_stay_as_they_are_in_a_model_of_16_bits():
    """Rounded to bf16, positions of some hundred tokens would be off by a radian, and the exported model's would not."""
    model = small_modernbert()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    engine, *_ = sctd_ds.initialize(
        model=model, model_parameters=model.parameters(), config=config, sctd_config={"keep_token_ids": [0]}
    )
    assert next(engine.module.parameters()).dtype == torch.bfloat16 and len(before) == 4
    for name, buffer in engine.module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_padding_far_from_any_token_attends_to_itself(monkeypatch):
    """A local layer leaves it nothing else, and the softmax of nothing is NaN in some kernels."""
    masks = []

    def attend(query, key, value, mask, dropout):
        masks.append(mask.expand(len(query), 1, query.shape[2], key.shape[2]))
        return plain_attend(query, key, value, mask, dropout)

    plain_attend = huggingface.attend
    monkeypatch.setattr(huggingface, "attend", attend)
    model = sctd_ds.convert(small_modernbert().train(), sctd_ds.ScTDConfig(keep_token_ids=[0], last_layer="all"))
    sctd_ds.set_mode(model, "align")
    ids, mask = torch.arange(1, 33)[None], (torch.arange(32) < 6).long()[None]
    model(input_ids=ids, attention_mask=mask, labels=torch.where(ids == 3, ids, -100)).loss.backward()
    assert len(masks) == 7 and all(x.any(-1).all() for x in masks)  # the first layer of four serves both passes
    assert not any(x[..., :6, 6:].any() for x in masks)


# A run of the recipe with a tokenizer of the user's


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """Byte-level BPE, as ModernBERT's own: it keeps spaces and line ends."""
    folder = tmp_path_factory.mktemp("bpe")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = list(names.values())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=bpe.pre_tokenizer.alphabet())
    bpe.train_from_iterator(["for i in range(10):\n        print(i)\n"], trainer)
    ends = [("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    bpe.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modern_run(tokenizer_folder, tmp_path_factory) -> Path:
    """The run of ds_configs/modern.json at toy size, on code."""
    folder = tmp_path_factory.mktemp("modern")
    lines = "\n\n".join(f"for i in range({n}):\n        print(i, {n % 7})" for n in range(200))
    (folder / "code.txt").write_text(lines)
    changes = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer.params.fused": False,
        "scheduler.params.num_warmup_steps": 1,
        "pretrain.model": TINY,
        "pretrain.tokenizer": str(tokenizer_folder),
        "pretrain.seq_length": 32,
        "pretrain.steps": 6,
        "pretrain.probe_steps": 1,
        "sctd.interval": 6,
    }
    changed = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    where = ["--data", str(folder / "code.txt"), "--output", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert pretrain.main(["--deepspeed_config", "modern", *where, *changed]) == 0
    return folder / "run"


def test_the_recipe_reports_both_mask_rates_and_what_a_step_computes(modern_run):
    report = json.loads((modern_run / "report.json").read_text())
    assert report["steps"] == 6 and set(report["step_ms"]) == {"dense", "drop", "align", "huggingface"}
    assert report["validation"].keys() >= {"loss_full", "loss_15", "loss_drop", "kl_last"}
    assert report["validated_on"]["mlm_probability"] == 0.3 and 0 < report["flops_saved"] < 0.3
    finished = compare.read(modern_run)
    assert finished.loss == report["validation"]["loss_15"] and finished.report["validated_on"]["mlm_probability"] == 0.15
    assert "A ModernBERT masked language model" in (modern_run / "model" / "README.md").read_text()


def test_the_exported_model_has_the_tokenizers_ids_and_reads_as_it_was_trained(modern_run, tokenizer_folder):
    model = transformers.AutoModelForMaskedLM.from_pretrained(modern_run / "model").eval()
    given, exported = (transformers.AutoTokenizer.from_pretrained(path) for path in (tokenizer_folder, modern_run / "model"))
    code = "for i in range(3):\n        print(i)  # x"
    ids = exported(code)["input_ids"]
    assert ids == given(code)["input_ids"] and exported.decode(ids, skip_special_tokens=True) == code
    for name in ("pad", "cls", "sep"):
        assert getattr(model.config, f"{name}_token_id") == getattr(given, f"{name}_token_id")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (given.cls_token_id, given.sep_token_id)
    assert model(**exported(code, return_tensors="pt")).logits.isfinite().all()
    assert read_importance(modern_run / "model").scores.unique().numel() > 2


def test_evaluation_reads_the_exported_model(modern_run):
    """Probes and drift drop tokens as training does; a task is fine-tuned."""
    model = Model("modern", str(modern_run / "model"))
    opened = analysis.open_model(model)
    rows = torch.randint(5, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    full, dropped, _ = analysis.states(opened, rows)
    with torch.no_grad():
        states = opened.network.eval().model(rows).last_hidden_state
    torch.testing.assert_close(full[-1], states, atol=1e-5, rtol=1e-5)
    assert [x.shape[1] for x in dropped] == [32, 16, 16, 32]
    drift = analysis.drift(model, ["for i in range(9): print(i) " * 20] * 8, length=32, count=8)
    assert drift["layer_cls"][:2] == pytest.approx([1, 1]) and drift["layer_cls"][2] < 1 - 1e-9
    examples = [{"sentence": f"print {n}", "label": n % 2} for n in range(32)]
    task = finetune.with_recipe(TASKS["sst2"], steps=2, batch=8)
    assert 0 <= finetune.finetune(model, task, {"train": examples, "validation": examples}, 0)["accuracy"] <= 100


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 64, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": torch.where(ids % 5 == 0, ids, -100)}


def test_the_trainer_trains_it(tmp_path):
    model: nn.Module = small_modernbert()
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True
    )
    callback = sctd_ds.ScTDCallback(sctd_ds.ScTDConfig(interval=2, keep_token_ids=[0]))
    transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback]).train()
    assert callback.clock.applied_steps == 4 and sctd_ds.importance(model).scores.unique().numel() > 2
