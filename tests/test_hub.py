"""The card of an exported model, and the command that uploads it, against a stand-in for the Hub."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, BertTokenizer

import sctd_ds
from helpers.bert import small_bert
from sctd_ds.__main__ import main
from sctd_ds.integrations.hub import model_card

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
REPORT = {
    "name": "tiny",
    "architecture": "BERT",
    "trained_model": None,
    "validation": {"loss_full": 2.34567},
    "validated_on": {"fingerprint": "0123abcd", "rows": 8, "seq_length": 16, "mlm_probability": 0.15},
    "steps": 1200,
    "global_batch": 32,
    "seq_length": 16,
    "time_saved": None,
    "environment": {"sctd_ds": "0.1.0", "device": "CPU"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The folder of a run with its model, table, tokenizer and card."""
    run = tmp_path_factory.mktemp("run")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocabulary, model_max_length=16).save_pretrained(run / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer", local_files_only=True, trust_remote_code=False)
    config = sctd_ds.ScTDConfig(keep_token_ids=[1, 2, 3, 4])
    model = sctd_ds.convert(small_bert(vocab_size=64, max_position_embeddings=16), config)
    sctd_ds.export(model, run / "model", tokenizer, str(model_card(REPORT, config, ["my.txt", "/home/me/private/corpus"])))
    return run


@pytest.fixture
def run(exported, tmp_path) -> Path:
    """A copy to change."""
    (tmp_path / "model").mkdir()
    for path in (exported / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path


class Hub:
    """What HfApi is asked for; `answers` makes a method raise, or return, something else."""

    calls: list[tuple[str, dict]]
    answers: dict[str, object]

    def __getattr__(self, method):
        def call(*arguments, **options):
            Hub.calls.append((method, {"arguments": arguments, **options}))
            answer = Hub.answers.get(method, "https://hub/me/tiny")
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def hub(monkeypatch):
    Hub.calls, Hub.answers = [], {"model_info": SimpleNamespace(private=True)}
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: Hub())
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return Hub


def test_the_card_says_what_is_known_and_guesses_nothing(exported):
    card = ModelCard.load(exported / "model" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "fill-mask")
    assert {"license", "language", "base_model"} & data.keys() == set()
    assert "token-dropping" in data["tags"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 2.3457)
    assert (
        result.dataset_args == REPORT["validated_on"] and result.dataset_name == "held-out rows of my.txt, .../private/corpus"
    )
    assert all(
        word in card.text for word in ("`0123abcd`", "1,200 x 32", "interval 10", "AutoModelForMaskedLM.from_pretrained")
    )
    assert "/home/me" not in str(card)


@pytest.mark.parametrize(
    ("changed", "method", "words", "absent"),
    [
        ({"trained_model": "google-bert/bert-base-uncased"}, "sctd", "base_model: google-bert/bert-base-uncased", "nothing"),
        ({"trained_model": "tests"}, "sctd", "| continued from | tests |", "base_model"),
        ({"validation": {}}, "dense", "all tokens) | not measured |", "model-index"),
        ({"validation": {"loss_full": float("nan")}}, "token_drop", "not measured", "model-index"),
        ({}, "dense", "by plain masked-language-model pretraining", "token-dropping"),
    ],
)
def test_cards_of_other_runs(changed, method, words, absent):
    text = str(model_card({**REPORT, **changed}, sctd_ds.ScTDConfig(method=method), ["my.txt"]))
    assert words in text and absent not in text


def test_an_exported_tokenizer_does_not_say_how_it_was_loaded(exported):
    settings = json.loads((exported / "model" / "tokenizer_config.json").read_text())
    assert settings["mask_token"] == "[MASK]" and {"is_local", "local_files_only"} & settings.keys() == set()


def test_pushing_uploads_the_model_and_its_card_and_nothing_else(run, hub, capsys):
    model = run / "model"
    for name in ("optimizer.pt", "trainer_state.json"):  # as in a Trainer's checkpoint
        (model / name).write_text("{}")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "local_files_only": True}))  # of an earlier version
    assert main(["push", str(run), "--to", "me/tiny", "--license", "apache-2.0", "--language", "en", "--private"]) == 0
    (_, made), _, (_, sent) = hub.calls
    assert made == {"arguments": ("me/tiny",), "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/tiny", model)
    wanted = "README.md config.json importance.safetensors model.safetensors tokenizer.json tokenizer_config.json"
    assert sent["allow_patterns"] == wanted.split()
    data = ModelCard.load(model / "README.md").data
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("apache-2.0", "en", "fill-mask")
    assert "local_files_only" not in (model / "tokenizer_config.json").read_text()
    out = capsys.readouterr().out
    assert "left out, as no part of the model: optimizer.pt, trainer_state.json" in out and "https://hub/me/tiny" in out
    assert main(["push", str(model), "--to", "me/tiny"]) == 0  # what was said once stays said
    assert "names no" not in capsys.readouterr().out


def test_a_dry_run_needs_no_login_and_changes_nothing(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    before = {path: path.read_bytes() for path in (run / "model").iterdir()}
    assert main(["push", str(run), "--to", "me/tiny", "--license", "mit", "--dry-run"]) == 0
    assert hub.calls == [] and before == {path: path.read_bytes() for path in (run / "model").iterdir()}
    out = capsys.readouterr().out
    assert re.search(r"MB  model.safetensors", out) and "license: mit" in out
    assert "the card names no language: add --language" in out


def test_a_model_without_a_card_gets_a_short_one(run, hub):
    (run / "model" / "README.md").unlink()
    assert main(["push", str(run), "--to", "me/tiny", "--license", "mit"]) == 0
    assert ModelCard.load(run / "model" / "README.md").data["license"] == "mit"


def damaged(name: str):
    return lambda run: (run / "model" / name).write_bytes(b"{")


def removed(name: str):
    return lambda run: (run / "model" / name).unlink()


def unfinished(run):
    (run / "model" / "config.json").unlink()
    (run / "checkpoints").mkdir()


def other_tokenizer(run):
    more = {f"word{number}": number for number in range(len(WORDS), 65)}
    vocabulary = {**{word: number for number, word in enumerate(WORDS)}, **more}
    BertTokenizer(vocab=vocabulary).save_pretrained(run / "model")


def other_weights(run):
    torch.save({}, run / "model" / "pytorch_model.bin")
    (run / "model" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "to", "words"),
    [
        (lambda run: None, "a b/c", "--to a b/c"),
        (lambda run: None, "tiny", "expected OWNER/NAME"),
        (unfinished, "me/tiny", "its run has not finished"),
        (removed("model.safetensors"), "me/tiny", "has no weights"),
        (removed("tokenizer.json"), "me/tiny", "lacks tokenizer.json"),
        (damaged("model.safetensors"), "me/tiny", "cannot be loaded"),
        (damaged("config.json"), "me/tiny", "cannot be loaded"),
        (damaged("importance.safetensors"), "me/tiny", "not an importance table"),
        (other_tokenizer, "me/tiny", "the model embeds 64 ids, its tokenizer has 65"),
        (other_weights, "me/tiny", "its weights lack "),
        (lambda run: (run / "model" / "README.md").write_text("---\na: [\n---\n"), "me/tiny", "README.md cannot be read"),
    ],
)
def test_what_cannot_be_uploaded_is_one_line(run, hub, capsys, damage, to, words):
    damage(run)
    assert main(["push", str(run), "--to", to]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("push: ") and words in error and hub.calls == []


@pytest.mark.parametrize(
    ("token", "answers", "words"),
    [
        (None, {}, "not logged in"),
        ("t", {"create_repo": huggingface_hub.errors.OfflineModeIsEnabled("offline mode")}, "cannot be reached"),
        ("t", {"upload_folder": ConnectionError("no route")}, "cannot be reached (ConnectionError: no route)"),
        ("t", {"model_info": SimpleNamespace(private=False)}, "it is public"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(run, hub, monkeypatch, capsys, token, answers, words):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    hub.answers.update(answers)
    assert main(["push", str(run), "--to", "me/tiny", "--private"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("push: ") and words in error
    if "upload_folder" not in answers:
        assert "upload_folder" not in dict(hub.calls)


def test_no_such_folder(tmp_path, capsys):
    assert main(["push", str(tmp_path / "none"), "--to", "me/tiny"]) == 2
    assert "none: no such folder" in capsys.readouterr().err
