"""Fine-tuning: one loop for all kinds of tasks, on transformers' heads and Trainer, resumable per task and seed.

The final weights are scored: the evaluation data does not select a checkpoint. The optimizer is AdamW
with weight decay 0.01, warm-up over 6 % of the steps and linear decay, none of which the paper specifies.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from sctd_ds.eval import scores, sources
from sctd_ds.eval.sources import EvalError, Row
from sctd_ds.eval.store import Model, fingerprint, remember
from sctd_ds.eval.tasks import Task

WARMUP, WEIGHT_DECAY = 0.06, 0.01
STRIDE = 128  # tokens that two windows of one long context share
LONGEST_ANSWER = 30  # tokens
CANDIDATES = 20  # number of best starts and of best ends that are combined


@dataclass(frozen=True)
class Limits:
    """Limits for trials and tests (None: the whole recipe). micro_batch: most rows on the device at once."""

    max_steps: int | None = None
    max_train: int | None = None
    max_eval: int | None = None
    micro_batch: int = 32


def finetune(
    model: Model,
    task: Task,
    data: dict[str, list[Row]],
    seed: int,
    limits: Limits | None = None,
    store: Path | None = None,
    origin: str = "real",
) -> dict[str, float]:
    """Fine-tune one model on one task with one seed, and score it; all scores in percent.

    data: checked rows by split ("train" and the task's own). store: the file that keeps the outcome, see `remember`.
    origin: of the data, "real" or "synthetic", for the report.
    """
    limits = limits or Limits()
    settings = {
        "model": model.fingerprint,
        "data": fingerprint(data),
        "recipe": asdict(task.recipe),
        "shots": task.shots,
        "seed": seed,
        "max_steps": limits.max_steps,
        "max_train": limits.max_train,
        "max_eval": limits.max_eval,
    }
    about = {"model": model.name, "task": task.name, "data": origin}
    return remember(store, settings, lambda: _run(model, task, data, seed, limits), **about)


def _run(model: Model, task: Task, data: dict[str, list[Row]], seed: int, limits: Limits) -> dict[str, float]:
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    config = transformers.AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    head = HEADS[task.kind](task, tokenizer, min(task.recipe.max_length, config.max_position_embeddings), data)
    train = few_shot(data["train"], task, seed) if task.shots else data["train"]
    train = _cut(train, limits.max_train, seed)
    network = head.network.from_pretrained(model.path, trust_remote_code=False, **head.options)
    examples = head.examples(train, training=True)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = transformers.Trainer(
            model=network,
            args=_arguments(task, len(examples), seed, limits, scratch),
            train_dataset=examples,
            data_collator=head.collate,
        )
        if trainer.args.n_gpu > 1:
            raise EvalError(f"{trainer.args.n_gpu} GPUs are visible, but fine-tuning uses one: set CUDA_VISIBLE_DEVICES=0")
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        for split in task.splits:
            rows = _cut(data[split], limits.max_eval, seed=0)
            output = trainer.predict(head.examples(rows, training=False)).predictions  # type: ignore[arg-type]
            prefix = f"{split.removeprefix('validation_')}_" if len(task.splits) > 1 else ""
            result.update({prefix + name: value for name, value in head.score(rows, output).items()})
    return result


def _arguments(task: Task, examples: int, seed: int, limits: Limits, scratch: str) -> transformers.TrainingArguments:
    """The Trainer's arguments for this many training examples."""
    recipe = task.recipe
    micro_batch = min(recipe.batch, limits.micro_batch)
    while recipe.batch % micro_batch:
        micro_batch -= 1
    steps = recipe.steps or math.ceil(examples / recipe.batch) * (recipe.epochs or 1)
    steps = min(steps, limits.max_steps or steps)
    gpu = torch.cuda.is_available()
    return transformers.TrainingArguments(
        output_dir=scratch,
        seed=seed,
        learning_rate=recipe.learning_rate,
        weight_decay=WEIGHT_DECAY,
        max_steps=steps,
        warmup_steps=math.ceil(WARMUP * steps),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=recipe.batch // micro_batch,
        per_device_eval_batch_size=limits.micro_batch,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=gpu,
        label_names=[],
    )


def few_shot(rows: list[Row], task: Task, seed: int) -> list[Row]:
    """Sentences with `task.shots` mentions of each entity type, in an order drawn from the seed.

    With 32 shots, a sentence is chosen if it has a type with fewer than 32 mentions so far. A type
    that the data mentions less often gets all its mentions; since sentences have several types,
    frequent ones end slightly above 32.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    assert task.shots is not None
    order = list(range(len(rows)))
    random.Random(f"few shots {task.name} {seed}").shuffle(order)
    taken: Counter[str] = Counter()
    chosen = []
    for i in order:
        types = [kind for kind, _, _ in get_entities(rows[i][task.label])]
        if any(taken[kind] < task.shots for kind in types):
            chosen.append(rows[i])
            taken.update(types)
    return chosen


class Head(ABC):
    """One kind of task: its network, the network's inputs from rows, and scores from its outputs."""

    network: Any
    options: dict[str, Any]

    def __init__(self, task: Task, tokenizer: Any, max_length: int, data: dict[str, list[Row]]) -> None:
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.options = {}

    def examples(self, rows: list[Row], training: bool) -> list[Any]:
        """The Trainer's data set. `collate` tokenizes it, so token ids are not stored."""
        return [{**row, "_training": training} for row in rows]

    @abstractmethod
    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """A batch of examples as the network's inputs, with labels when training."""

    @abstractmethod
    def score(self, rows: list[Row], output: Any) -> dict[str, float]:
        """Scores of the network's outputs on rows."""

    def _encode(self, *texts: Sequence[str], **options: Any) -> Any:
        return self.tokenizer(*texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt", **options)


class Classification(Head):
    """One text or a pair. With more than two columns, the first is the first text, and the others are joined as the second."""

    network = transformers.AutoModelForSequenceClassification

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.options = {"num_labels": len(self.task.classes)}

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        first, *others = self.task.inputs
        texts = [[row[first] for row in rows]]
        if others:
            texts.append([" ".join(row[column] for column in others) for row in rows])
        batch = dict(self._encode(*texts))
        if rows[0]["_training"]:
            batch["labels"] = torch.tensor([row[self.task.label] for row in rows])
        return batch

    def score(self, rows: list[Row], output: Any) -> dict[str, float]:
        gold, predicted = [row[self.task.label] for row in rows], output.argmax(axis=-1).tolist()
        if self.task.name == "multirc":
            return scores.multirc([row["question_id"] for row in rows], gold, predicted)
        return scores.classification(gold, predicted)


class Regression(Classification):
    """A score for a pair, trained with mean squared error."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.options = {"num_labels": 1, "problem_type": "regression"}

    def score(self, rows: list[Row], output: Any) -> dict[str, float]:
        return scores.correlation([row[self.task.label] for row in rows], output.squeeze(-1))


class MultipleChoice(Head):
    """A premise with each of two choices, which start with "because" for a cause and "so" for an effect."""

    network = transformers.AutoModelForMultipleChoice

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        link = {"cause": "because", "effect": "so"}
        premises = [row["premise"] for row in rows for _ in range(2)]
        choices = [f"{link[row['question']]} {row[choice]}" for row in rows for choice in ("choice1", "choice2")]
        batch = {name: value.view(len(rows), 2, -1) for name, value in self._encode(premises, choices).items()}
        if rows[0]["_training"]:
            batch["labels"] = torch.tensor([row[self.task.label] for row in rows])
        return batch

    def score(self, rows: list[Row], output: Any) -> dict[str, float]:
        return scores.classification([row[self.task.label] for row in rows], output.argmax(axis=-1).tolist())


class Tagging(Head):
    """A tag per word, predicted at its first token. Words beyond the length, or without tokens, are predicted as O."""

    network = transformers.AutoModelForTokenClassification

    def __init__(self, task: Task, tokenizer: Any, max_length: int, data: dict[str, list[Row]]) -> None:
        super().__init__(task, tokenizer, max_length, data)
        self.names = sorted({tag for rows in data.values() for row in rows for tag in row[task.label]})
        self.options = {"num_labels": len(self.names)}

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        encoded = self._encode([row["tokens"] for row in rows], is_split_into_words=True)
        batch = dict(encoded)
        if rows[0]["_training"]:
            number = {name: i for i, name in enumerate(self.names)}
            batch["labels"] = torch.full_like(batch["input_ids"], -100)
            for i, row in enumerate(rows):
                for word, position in _first_tokens(encoded.word_ids(i)).items():
                    batch["labels"][i, position] = number[row[self.task.label][word]]
        return batch

    def score(self, rows: list[Row], output: Any) -> dict[str, float]:
        predicted = []
        for row, best in zip(rows, output.argmax(axis=-1), strict=True):
            encoded = self.tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=self.max_length)
            tags = ["O"] * len(row["tokens"])
            for word, position in _first_tokens(encoded.word_ids()).items():
                tags[word] = self.names[best[position]]
            predicted.append(tags)
        return scores.entities([row[self.task.label] for row in rows], predicted)


class Spans(Head):
    """A question and windows of its context. The best span of all windows is the answer; [CLS] means no answer."""

    network = transformers.AutoModelForQuestionAnswering

    def examples(self, rows: list[Row], training: bool) -> list[Any]:
        """Windows: the inputs of each, and for training the answer's ends, or for scoring what maps tokens back to text."""
        windows: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            # Some questions of the real data are long; they must leave room for the context.
            question = " ".join(row["question"].split()[: self.max_length // 4])
            encoded = self.tokenizer(
                question,
                row["context"],
                truncation="only_second",
                max_length=self.max_length,
                stride=min(STRIDE, self.max_length // 4),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for i, offsets in enumerate(encoded["offset_mapping"]):
                inside = [part == 1 for part in encoded.sequence_ids(i)]
                # Arrays, because lists of Python numbers would need gigabytes for all of SQuAD.
                names = [name for name in self.tokenizer.model_input_names if name in encoded]
                inputs = {name: np.array(encoded[name][i], dtype=np.int32) for name in names}
                if training:
                    windows.append({"inputs": inputs, "ends": _ends(row["answers"], offsets, inside)})
                else:
                    windows.append({"inputs": inputs, "row": index, "offsets": offsets, "inside": inside})
        return windows

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        lists = [{name: value.tolist() for name, value in row["inputs"].items()} for row in rows]
        batch = dict(self.tokenizer.pad(lists, padding=True, return_tensors="pt"))
        if "ends" in rows[0]:
            start, end = zip(*(row["ends"] for row in rows), strict=True)
            batch.update(start_positions=torch.tensor(start), end_positions=torch.tensor(end))
        return batch

    def score(self, rows: list[Row], output: Any) -> dict[str, float]:
        starts, ends = output[:2]
        best = [(-math.inf, "")] * len(rows)
        empty = [math.inf] * len(rows)  # score of no answer
        for window, start, end in zip(self.examples(rows, training=False), starts, ends, strict=True):
            row = window["row"]
            span = _best_span(window, rows[row]["context"], start, end)
            if span[0] > best[row][0]:
                best[row] = span
            # Most windows of an answerable question lack its answer, so the lowest score over the windows counts.
            empty[row] = min(empty[row], float(start[0] + end[0]))
        no_answer = [empty[i] - best[i][0] for i in range(len(rows))] if self.task.no_answer else None
        return scores.squad([row["answers"]["text"] for row in rows], [text for _, text in best], no_answer)


HEADS: dict[str, type[Head]] = {
    "classify": Classification,
    "regress": Regression,
    "choose": MultipleChoice,
    "tag": Tagging,
    "span": Spans,
}


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Position of the first token of each word."""
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    return first


def _ends(answers: dict[str, list[Any]], offsets: Sequence[tuple[int, int]], inside: Sequence[bool]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), which is [CLS], unless the window contains all of it."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    stop = begin + len(answers["text"][0])
    covered = [i for i, (a, b) in enumerate(offsets) if inside[i] and a < stop and b > begin]
    if not covered or offsets[covered[0]][0] > begin or offsets[covered[-1]][1] < stop:
        return 0, 0
    return covered[0], covered[-1]


def _best_span(window: dict[str, Any], context: str, start: np.ndarray, end: np.ndarray) -> tuple[float, str]:
    """Score and text of a window's best span: inside the context, start before end, at most LONGEST_ANSWER tokens."""
    inside = np.flatnonzero(window["inside"])
    if not len(inside):
        return -math.inf, ""
    best = (-math.inf, "")
    for i in inside[np.argsort(-start[inside])][:CANDIDATES]:
        for j in inside[np.argsort(-end[inside])][:CANDIDATES]:
            if i <= j < i + LONGEST_ANSWER and start[i] + end[j] > best[0]:
                best = float(start[i] + end[j]), context[window["offsets"][i][0] : window["offsets"][j][1]]
    return best


def _cut(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """At most `count` rows, a sample drawn from the seed; None: all of them, in order."""
    if count is None or count >= len(rows):
        return rows
    return random.Random(f"cut {seed}").sample(rows, count)


def load_data(task: Task, data_dir: Path | None, hub: bool) -> dict[str, list[Row]]:
    """All splits that fine-tuning a task needs. Raises EvalError."""
    return {split: sources.load(task, split, data_dir, hub) for split in ("train", *task.splits)}


def with_recipe(task: Task, **changes: Any) -> Task:
    """The task with other hyper-parameters. Setting epochs unsets steps, and vice versa."""
    if "epochs" in changes or "steps" in changes:
        changes = {"epochs": None, "steps": None, **changes}
    return replace(task, recipe=replace(task.recipe, **changes))
