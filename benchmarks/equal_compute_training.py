"""One run of the equal-compute study: its data, its model, and the loop that trains it through the package's public path.

The generated language gives the text, `data.build` the vocabulary and the rows. `sctd_ds.convert` and `sctd_ds.StepClock`
decide what a step does, so schedule, dense phases and importance table are those of every user's run.
"""

from __future__ import annotations

import collections
import fcntl
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import sctd_ds
from benchmarks.equal_compute_arms import Arm, Costs, Regime, Study
from sctd_ds import ScTDConfig, data
from sctd_ds.adapters.special_tokens import special_ids
from sctd_ds.config import ConfigError
from sctd_ds.eval.grammar import Language
from sctd_ds.method.flops import Shape
from sctd_ds.run.environment import commit, device_name, versions
from sctd_ds.run.output import replacing
from sctd_ds.run.validation import validate

LEXICON = {"nouns": 240, "verbs": 160, "adjectives": 80, "names": 40}  # of the default language
HELD_OUT = 0.2  # share of the text that validation may use
POINTS, POINT_ROWS = 10, 512  # validations along a run, and the rows of each: the first of the held-out set
VALIDATION_ROWS = 192  # rows per validation batch
WINDOW = 50  # steps whose mean training loss is recorded


@dataclass(frozen=True)
class Text:
    """Rows to train on, and the validation set as batches, the same for every run."""

    packed: data.PackedData
    trunk: data.PackedData
    """The rows of the trunk: those of `packed`, or another text's with the same vocabulary."""
    validation: list[data.Batch]
    beginning: list[data.Batch]
    """The first rows of the validation set, for the points along a run."""

    @property
    def labels(self) -> int:
        """Labelled tokens of the validation set."""
        return sum(int((batch["labels"] != -100).sum()) for batch in self.validation)

    @property
    def vocabulary(self) -> int:
        """Rows of a model's embedding."""
        return -(-len(self.packed.tokenizer) // 8) * 8


def read_text(study: Study, folder: Path, regime: Regime) -> Text:
    """The text of a regime, packed once into `folder`. Where the trunk learned another one, both have one vocabulary.

    Raises ConfigError where the text is too short to validate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, options = _source(study, study.text, folder), {"seq_length": study.length, "validation_fraction": HELD_OUT}
    build = partial(data.prepare, cache_dir=folder, vocab_size=study.vocabulary, **options)
    if regime == "trunk" and study.trunk_text != study.text:
        before = _source(study, study.trunk_text, folder)
        tokenizer = str(build([before, source]) / "tokenizer")
        packed, of_trunk = (data.load(build(each, tokenizer=tokenizer)) for each in (source, before))
    else:
        packed = of_trunk = data.load(build(source))
    masker = data.Masker(packed.tokenizer, 0)
    rows = math.ceil(study.labels / masker.labels_per_row(study.length))
    if rows > len(packed.validation):
        raise ConfigError(
            f"--labels {study.labels} needs {rows} held-out rows, and {source} gives {len(packed.validation)}: "
            "raise --documents of a generated language, or give more --text"
        )
    batches = partial(data.validation_batches, packed.validation.select(range(rows)), masker, batch_size=VALIDATION_ROWS)
    beginning = batches(max_batches=math.ceil(POINT_ROWS / VALIDATION_ROWS))
    return Text(packed, of_trunk, list(batches()), list(beginning))


def _source(study: Study, text: str, folder: Path) -> str:
    """A text as `data.build` takes it; a generated language is written into `folder` first."""
    name, _, seed = text.partition(":")
    if name != "language":
        return text
    if not (seed or "0").isdecimal():
        raise ConfigError(f'{text}: expected "language" or "language:SEED", with a whole number')
    path = folder / f"language-{seed or 0}-{study.documents}-{study.lexicon:g}.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one writes, and the others find the file
        if not path.exists():
            sizes = {name: max(20, round(study.lexicon * size)) for name, size in LEXICON.items()}
            documents = "\n\n".join(Language(int(seed or 0), **sizes).documents(study.documents))
            with replacing(path) as partial_file:
                partial_file.write_text(documents, encoding="utf-8")
    return str(path)


def costs(study: Study, text: Text) -> Costs:
    """What a step of the study's model costs."""
    labels = data.Masker(text.packed.tokenizer, 0).labels_per_row(study.length)
    shape = Shape(study.layers, study.hidden, study.intermediate, text.vocabulary, study.length, labels)
    return Costs(shape, study.rows)


class Trainer:
    """A model of one seed, its optimizer, its data and its clock. A step is what a loop of a user's own would do.

    method: the schedule. arm: for its layers and rows. rows: the training data; position: how many of them were used before.
    """

    def __init__(
        self, study: Study, text: Text, arm: Arm, method: ScTDConfig, seed: int, rows: data.PackedData, position: int = 0
    ) -> None:
        transformers.set_seed(seed)
        sizes = transformers.BertConfig(
            vocab_size=text.vocabulary,
            hidden_size=study.hidden,
            num_hidden_layers=arm.layers(study.layers),
            num_attention_heads=study.heads,
            intermediate_size=study.intermediate,
            max_position_embeddings=study.length,
            hidden_dropout_prob=study.dropout,
            attention_probs_dropout_prob=study.dropout,
            initializer_range=study.initializer,
            pad_token_id=text.packed.tokenizer.pad_token_id,
        )
        masker = data.Masker(text.packed.tokenizer, seed)
        ids, labels = special_ids(text.packed.tokenizer), masker.labels_per_row(study.length)
        method = method.model_copy(update={"keep_token_ids": ids, "labels_per_row": labels})
        self.model = sctd_ds.convert(transformers.BertForMaskedLM(sizes), method).train()
        self.clock = sctd_ds.StepClock(self.model)
        self.optimizer = torch.optim.AdamW(_groups(self.model), betas=(0.9, 0.98), eps=1e-6, fused=True)
        self._batches = data.Loader(
            rows.train, masker, micro_batch=arm.rows(study.rows), accumulation=1, rank=0, world=1, seed=seed, start=position
        )
        torch.manual_seed(seed + 1)  # of dropout: the same for every arm

    def step(self, rate: float) -> tuple[str, float]:
        """One optimizer step; returns its mode and its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mode = self.clock.begin()
        loss = self.model(**next(self._batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.end()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ConfigError(f"the loss of step {self.clock.applied_steps} is {value}: lower --rate")
        return mode, value


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors (biases, normalisation) without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]


def rate_at(study: Study, regime: Regime, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 1) of `steps`: linear warm-up from scratch, then linear decay to zero."""
    warmup = min(study.warmup, steps // 2) if regime == "scratch" else 0
    if step <= warmup:
        return study.rate * step / warmup
    return study.rate * (steps - step + 1) / (steps - warmup)


def make_trunk(study: Study, text: Text, seed: int, path: Path) -> None:
    """Train the dense trunk of a seed at a constant rate after warm-up, and write weights, optimizer, table and loss."""
    # Nothing is dropped: the method is there for the table, which learns from the dense steps' losses.
    trainer = Trainer(study, text, Arm({}), ScTDConfig(dense_start=study.trunk_steps), seed, text.trunk)
    start, losses = time.process_time(), []
    for step in range(1, study.trunk_steps + 1):
        losses.append(trainer.step(study.rate * min(1.0, step / study.warmup if study.warmup else 1.0))[1])
    state = {
        "settings": {**study.settings("trunk"), "data": text.trunk.meta.fingerprint},
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "importance": sctd_ds.importance(trainer.model).state_dict(),
        "training": _windows(losses),
        "loss_full": validate(trainer.model, text.beginning)["loss_full"],
        "seconds": time.process_time() - start,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial_file:
        torch.save(state, partial_file)


def start(study: Study, text: Text, regime: Regime, arm: Arm, steps: int, seed: int, trunk: Path | None) -> Trainer:
    """The trainer of an arm before its first step: a new model, or the trunk's, with its optimizer and its table."""
    goes_on = regime == "trunk" and text.trunk is text.packed
    position = study.trunk_steps * study.rows if goes_on else 0
    trainer = Trainer(study, text, arm, arm.config(steps), seed, text.packed, position)
    if regime == "trunk":
        assert trunk is not None
        state = torch.load(trunk, weights_only=True)
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        if arm.method.get("importance", "loss") == "loss":
            sctd_ds.importance(trainer.model).load_state_dict(state["importance"])
    return trainer


def run(study: Study, text: Text, regime: Regime, arm: Arm, seed: int, trunk: Path | None = None) -> dict[str, Any]:
    """Train one arm with one seed; returns what its file holds. trunk: the seed's, in the regime of that name."""
    cost = costs(study, text)
    steps = cost.steps(arm, study.budget_of(regime))
    of_modes = cost.of_modes(arm, arm.config(steps))
    trainer = start(study, text, regime, arm, steps, seed, trunk)
    began, spent, losses, points = time.process_time(), 0.0, [], []
    taken: collections.Counter[str] = collections.Counter()
    marks = {round(steps * i / POINTS) for i in range(1, POINTS + 1)}
    for step in range(1, steps + 1):
        mode, loss = trainer.step(rate_at(study, regime, step, steps))
        taken[mode] += 1
        losses.append(loss)
        spent += of_modes[mode]
        if step in marks:
            points.append({"step": step, "dense_steps": spent, **validate(trainer.model, text.beginning)})
    trained = time.process_time() - began
    # What counts is the full pass, which a dense model's validation runs alone; the dropped pass stands in the last point.
    final = validate(sctd_ds.convert(trainer.model, ScTDConfig(method="dense")), text.validation)
    return {
        "settings": {**study.settings(regime), "method": dict(arm.method), "data": text.packed.meta.fingerprint},
        "layers": arm.layers(study.layers),
        "rows": arm.rows(study.rows),
        "steps": steps,
        "modes": dict(taken),
        "dense_steps": spent,
        "labels": text.labels,
        "loss_full": final["loss_full"],
        "points": points,
        "training": _windows(losses),
        "seconds": trained,
        "commit": commit(),
        "environment": {"device": device_name("cpu"), **versions("torch", "triton", "transformers", "datasets", "sctd_ds")},
    }


def _windows(losses: list[float]) -> list[tuple[int, float]]:
    """(last step, mean loss) of every window of training steps."""
    ends = range(WINDOW, len(losses) + 1, WINDOW)
    return [(end, sum(losses[end - WINDOW : end]) / WINDOW) for end in ends]


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial_file:
        partial_file.write_text(json.dumps(record, indent=1), encoding="utf-8")
