"""All tasks in one table: columns, classes, metrics, the paper's hyper-parameters, and the source of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classify", "regress", "choose", "span", "tag"]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of fine-tuning. Exactly one of epochs and steps is set.

    learning_rate, batch, epochs and steps are from Table 7 of the paper, max_length from its Section 4.1. Table 7 omits the
    tagging tasks and SICK-R, whose values are from the ranges of Section 4.1. `finetune` sets warm-up and weight decay.
    """

    learning_rate: float
    batch: int
    steps: int | None = None
    epochs: int | None = None
    max_length: int = 256


@dataclass(frozen=True)
class Source:
    """The source of a task's files. repo None: every repository would run its own code; `note` names another source."""

    repo: str | None
    config: str | None = None
    files: dict[str, tuple[str, ...]] | None = None
    """The repository's JSON-lines files by split, if it defines no splits."""
    labels: str | None = None
    """The repository's file that maps tag names to numbers."""
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One task. inputs: text columns in the model's reading order; label: the column to predict.

    classes: names in the order of the label's numbers; empty for numbers and spans, and for tags (the data has them).
    metrics: those of `finetune`'s results that the paper reports; their mean is the task's score.
    splits: the splits to evaluate on. shots: mentions of each entity type to train on (None: all of the data).
    """

    name: str
    title: str
    kind: Kind
    inputs: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    recipe: Recipe
    source: Source
    splits: tuple[str, ...] = ("validation",)
    shots: int | None = None
    score_range: tuple[float, float] = (0.0, 5.0)
    no_answer: bool = False


def _glue(config: str) -> Source:
    return Source("nyu-mll/glue", config)


def _superglue(config: str) -> Source:
    return Source("aps/super_glue", config)


_NOT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_SICK = Source(
    None,
    note="SICK_train.txt and SICK_trial.txt of the SICK distribution (SemEval 2014 task 1), unchanged, "
    "as sick/train.tsv and sick/validation.tsv",
)
_CONLL = Source(
    "lhoestq/conll2003",
    note="the text is under the licence of the Reuters Corpus; eng.train and eng.testa of the shared task also work, "
    "as conll03/train.conll and conll03/validation.conll",
)
_ONTONOTES = Source(
    "tner/ontonotes5",
    files={"train": tuple(f"dataset/train0{i}.json" for i in range(4)), "validation": ("dataset/valid.json",)},
    labels="dataset/label.json",
    note="the text is licensed by the LDC (LDC2013T19)",
)
_TAGGING = Recipe(5e-5, 16, epochs=30)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "CoLA", "classify", ("sentence",), "label", ("unacceptable", "acceptable"), ("mcc",),
             Recipe(2e-5, 32, steps=2668), _glue("cola")),
        Task("mrpc", "MRPC", "classify", ("sentence1", "sentence2"), "label", ("not_equivalent", "equivalent"),
             ("accuracy", "f1"), Recipe(1e-5, 32, steps=1148), _glue("mrpc")),
        Task("stsb", "STS-B", "regress", ("sentence1", "sentence2"), "label", (), ("pearson", "spearman"),
             Recipe(2e-5, 32, steps=1799), _glue("stsb")),
        Task("rte", "RTE", "classify", ("sentence1", "sentence2"), "label", _NOT, ("accuracy",),
             Recipe(1e-5, 16, steps=2036), _glue("rte")),
        Task("mnli", "MNLI", "classify", ("premise", "hypothesis"), "label", _NLI,
             ("matched_accuracy", "mismatched_accuracy"), Recipe(1e-5, 256, steps=15484), _glue("mnli"),
             splits=("validation_matched", "validation_mismatched")),
        Task("sst2", "SST-2", "classify", ("sentence",), "label", ("negative", "positive"), ("accuracy",),
             Recipe(1e-5, 64, steps=10467), _glue("sst2")),
        Task("boolq", "BoolQ", "classify", ("passage", "question"), "label", ("False", "True"), ("accuracy",),
             Recipe(1e-5, 16, epochs=10, max_length=512), _superglue("boolq")),
        Task("cb", "CB", "classify", ("premise", "hypothesis"), "label", ("entailment", "contradiction", "neutral"),
             ("accuracy",), Recipe(2e-5, 16, epochs=20), _superglue("cb")),
        Task("multirc", "MultiRC", "classify", ("paragraph", "question", "answer"), "label", ("False", "True"),
             ("f1",), Recipe(2e-5, 32, epochs=10, max_length=512), _superglue("multirc")),
        Task("copa", "COPA", "choose", ("premise", "question", "choice1", "choice2"), "label", ("choice1", "choice2"),
             ("accuracy",), Recipe(2e-5, 16, epochs=10), _superglue("copa")),
        Task("squad", "SQuAD v1", "span", ("question", "context"), "answers", (), ("exact_match",),
             Recipe(3e-5, 12, epochs=2, max_length=384), Source("rajpurkar/squad", "plain_text")),
        Task("squad_v2", "SQuAD v2", "span", ("question", "context"), "answers", (), ("exact_match",),
             Recipe(3e-5, 12, epochs=2, max_length=384), Source("rajpurkar/squad_v2", "squad_v2"), no_answer=True),
        Task("conll03", "CoNLL03", "tag", ("tokens",), "ner_tags", (), ("f1",), _TAGGING, _CONLL, shots=32),
        Task("ontonotes", "OntoNotes 5", "tag", ("tokens",), "tags", (), ("f1",), _TAGGING, _ONTONOTES, shots=32),
        Task("sick", "SICK-R", "regress", ("sentence_A", "sentence_B"), "relatedness_score", (), ("spearman",),
             Recipe(2e-5, 32, epochs=10), _SICK, score_range=(1.0, 5.0)),
    )
}  # fmt: skip

SUITES: dict[str, tuple[str, ...]] = {
    "glue": ("cola", "mrpc", "stsb", "rte", "mnli", "sst2"),
    "superglue": ("boolq", "cb", "multirc", "copa"),
    "squad": ("squad", "squad_v2"),
    "semantic": ("ontonotes", "conll03", "mrpc", "sick"),
}

PROBES: dict[str, tuple[str, tuple[str, str]]] = {
    "tense": ("past_present.txt", ("PAST", "PRES")),
    "number": ("subj_number.txt", ("NN", "NNS")),
}
"""SentEval's probing tasks: file name and labels. Lines are `tr|va|te <tab> label <tab> sentence`."""
PROBE_NOTE = "get data/probing/{file} from the SentEval repository (facebookresearch/SentEval)"
