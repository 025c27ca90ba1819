"""Synthetic twins: every task, with the columns and labels of the real one, made of the generated language.

They test the whole path without a download, and at small scale they tell models apart: what each of them asks for (agreement,
roles, voice, synonyms, kinds, negation, reference to a text) is in the language's documents, and labels are balanced.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sctd_ds.eval.grammar import KINDS, PAST_ADVERBS, PRESENT_ADVERBS, SPLITS, Event, Language, Phrase, Random, be, pick
from sctd_ds.eval.tasks import PROBES, TASKS

Row = dict[str, Any]
Maker = Callable[[Language, Random, int], Row]
MARK = "SYNTHETIC"
"""A file of this name marks a folder of twins, so that no report takes them for the real data."""
ENTITY_TYPES = {"conll03": ("PER", "ORG", "LOC"), "ontonotes": ("PERSON", "ORG", "GPE", "DATE")}


def twin(name: str, split: str, count: int, language: Language | None = None, seed: int = 0) -> list[Row]:
    """`count` rows of a task's twin. Splits are drawn apart, with the same words."""
    language = language or Language()
    rows = []
    for i in range(count):
        # The two answers to a question of MultiRC are drawn alike, so that they are about one story.
        source = i // 2 if name == "multirc" else i
        rows.append(MAKERS[name](language, random.Random(f"sctd_ds twin {name} {split} {seed} {source}").random, i))
    return rows


def write_twins(
    folder: Path, *, train: int = 2000, validation: int = 500, language: Language | None = None, seed: int = 0
) -> None:
    """Write all twins as JSON lines where `sources.load` looks for them, and both probes in SentEval's format."""
    language = language or Language()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(
        "Synthetic twins made by `python -m sctd_ds.eval twins`; not the data sets they are named after.\n"
    )
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", *task.splits):
            rows = twin(name, split, train if split == "train" else validation, language, seed)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for name, (file, _) in PROBES.items():
        short = {"train": "tr", "validation": "va", "test": "te"}
        lines = [
            f"{short[split]}\t{label}\t{sentence}\n"
            for split in SPLITS
            for label, sentence in language.probe(name, train if split == "train" else validation, split, seed)  # type: ignore[arg-type]
        ]
        (folder / file).write_text("".join(lines), encoding="utf-8")


def _cola(language: Language, draw: Random, i: int) -> Row:
    """Acceptable: the present verb agrees with its subject, and not with the attractor beside it."""
    event = language.event(draw, past=False)
    attractor = Phrase(language.phrase(draw).noun, not event.agent.plural)
    right = i % 2
    verb = event.verb.form(False, event.agent.plural if right else not event.agent.plural)
    return {"sentence": f"{event.agent} near {attractor} {verb} {event.patient} .", "label": right, "idx": i}


def _sst2(language: Language, draw: Random, i: int) -> Row:
    """The polarity of the predicate, which "not" turns; the adjective of the subject may say the opposite."""
    good, negated = i % 2 == 1, draw() < 0.4
    subject, past = language.phrase(draw, adjective=0.5), draw() < 0.5
    said = language.adjective(draw, good != negated)
    return {
        "sentence": f"{subject} {be(past, subject.plural)} {'not ' if negated else ''}{said} .",
        "label": int(good),
        "idx": i,
    }


def _paraphrase(language: Language, draw: Random, event: Event) -> str:
    verb = language.synonym(event.verb) if draw() < 0.5 else event.verb
    return (event.passive(verb) if draw() < 0.7 else event.active(verb)) + " ."


def _swapped(event: Event) -> Event:
    return dataclasses.replace(event, agent=event.patient, patient=event.agent)


def _mrpc(language: Language, draw: Random, i: int) -> Row:
    """Equivalent: the same event in another voice or with a synonym. Not: agent and patient change places."""
    event = language.event(draw)
    other = event if i % 2 else _swapped(event)
    return {"sentence1": event.active() + " .", "sentence2": _paraphrase(language, draw, other), "label": i % 2, "idx": i}


def _similar(language: Language, draw: Random, i: int) -> tuple[str, str, int]:
    """Two events that share `i % 6` of agent, patient, meaning, place and tense, the second as a paraphrase."""
    shared = i % 6
    event = language.event(draw, place=1.0, adjective=0.0)
    other = language.event(draw, past=not event.past, place=1.0, adjective=0.0)
    while (
        other.place == event.place
        or other.verb.meaning == event.verb.meaning
        or other.agent.noun is event.agent.noun
        or other.patient.noun is event.patient.noun
    ):
        other = language.event(draw, past=not event.past, place=1.0, adjective=0.0)
    differ = ["agent", "verb", "patient", "place", "past"]
    for _ in range(shared):
        differ.pop(int(draw() * len(differ)))
    mixed = dataclasses.replace(event, **{slot: getattr(other, slot) for slot in differ})
    return event.active() + " .", _paraphrase(language, draw, mixed), shared


def _stsb(language: Language, draw: Random, i: int) -> Row:
    one, two, shared = _similar(language, draw, i)
    return {"sentence1": one, "sentence2": two, "label": float(shared), "idx": i}


def _sick(language: Language, draw: Random, i: int) -> Row:
    one, two, shared = _similar(language, draw, i)
    return {"sentence_A": one, "sentence_B": two, "relatedness_score": 1 + 0.8 * shared}


def _nli(language: Language, draw: Random, relation: str) -> tuple[str, str]:
    """A premise, said or denied, and a hypothesis, mostly of the same words.

    Entailed: the same, paraphrased, or of the agent's kind. Contradicted: the opposite, or of another kind. Neutral: said or
    denied, mostly as the premise is, of exchanged roles.
    """
    event = language.event(draw, adjective=0.0)
    agent, entailed = event.agent, relation == "entailment"
    if relation != "neutral" and draw() < 0.4:
        kind = pick([kind for kind in KINDS if (kind == agent.noun.kind) == entailed], draw)
        named = f"{kind}s" if agent.plural else f"a {kind}"
        return event.active() + " .", f"{named} {event.verb.form(event.past, agent.plural)} {event.patient} ."
    denied = draw() < 0.4
    said, same = (event, entailed) if relation != "neutral" else (_swapped(event), draw() < 0.8)
    hypothesis = _denied(said) if denied == same else _paraphrase(language, draw, said)
    return _denied(event) if denied else event.active() + " .", hypothesis


def _denied(event: Event) -> str:
    return f"{event.patient} {be(event.past, event.patient.plural)} not {event.verb.past} by {event.agent} ."


def _rte(language: Language, draw: Random, i: int) -> Row:
    relation = "entailment" if i % 2 == 0 else "neutral" if draw() < 0.75 else "contradiction"
    one, two = _nli(language, draw, relation)
    return {"sentence1": one, "sentence2": two, "label": i % 2, "idx": i}


def _mnli(language: Language, draw: Random, i: int) -> Row:
    one, two = _nli(language, draw, TASKS["mnli"].classes[i % 3])
    return {"premise": one, "hypothesis": two, "label": i % 3, "idx": i}


def _cb(language: Language, draw: Random, i: int) -> Row:
    one, two = _nli(language, draw, TASKS["cb"].classes[i % 3])
    return {"premise": f"{language.person(draw)} {'was' if draw() < 0.5 else 'is'} {language.adjective(draw, True)} . {one}",
            "hypothesis": two, "idx": i, "label": i % 3}  # fmt: skip


def _story(language: Language, draw: Random, events: int, place: float = 0.3) -> list[Event]:
    """Events of one tense with different agents, verbs and patients, so that questions have one answer."""
    past = draw() < 0.5
    told: list[Event] = []
    while len(told) < events:
        event = language.event(draw, past=past, place=place, adjective=0.0)
        new = (event.agent.noun, event.patient.noun, event.verb.meaning)
        known = [(e.agent.noun, e.patient.noun, e.verb.meaning) for e in told]
        if not any(a == b for old in known for a, b in zip(new, old, strict=True)):
            told.append(event)
    return told


def _tell(told: list[Event]) -> str:
    return " ".join(f"{event.active()} ." for event in told)


def _boolq(language: Language, draw: Random, i: int) -> Row:
    told = _story(language, draw, 4)
    event = told[int(draw() * 4)]
    asked = event if i % 2 else _swapped(event)
    return {"question": f"{be(event.past, asked.patient.plural)} {asked.patient} {event.verb.past} by {asked.agent}",
            "passage": _tell(told), "idx": i, "label": i % 2}  # fmt: skip


def _multirc(language: Language, draw: Random, i: int) -> Row:
    """Two answers to each question: the patient of the story, and that of another of its events."""
    right = i % 2
    event, *others = _story(language, draw, 4)
    told = sorted([event, *others], key=lambda e: e.verb.plain)
    return {"paragraph": _tell(told), "question": f"who {be(event.past, False)} {event.verb.past} by {event.agent}",
            "answer": str((event if right else others[0]).patient),
            "idx": {"paragraph": i // 2, "question": i // 2, "answer": i}, "label": right}  # fmt: skip


def _copa(language: Language, draw: Random, i: int) -> Row:
    """What an event brings about, or what brought it about; documents tell ("... because ...").

    The wrong choice is drawn as the right one is, so that no verb is right more often than another.
    """
    cause = language.event(draw, place=0.0, adjective=0.0)
    effect = language.verb_of(cause.verb.effect, draw)
    wrong = cause.verb
    while wrong.meaning in (cause.verb.meaning, effect.meaning) or wrong.effect == cause.verb.meaning:
        wrong = language.event(draw).verb

    def happened(verb: Any) -> str:
        return f"{cause.patient} {verb.form(cause.past, cause.patient.plural)} ."

    def did(verb: Any) -> str:
        return f"{cause.agent} {verb.form(cause.past, cause.agent.plural)} {cause.patient} ."

    asks_cause = draw() < 0.5
    premise, right, other = (
        (happened(effect), did(cause.verb), did(wrong))
        if asks_cause
        else (did(cause.verb), happened(effect), happened(language.verb_of(wrong.effect, draw)))
    )
    choices = (right, other) if i % 2 == 0 else (other, right)
    return {"premise": premise, "choice1": choices[0], "choice2": choices[1],
            "question": "cause" if asks_cause else "effect", "idx": i, "label": i % 2}  # fmt: skip


def _squad(language: Language, draw: Random, i: int, answerable: bool = True) -> Row:
    """Who did it; the answer is the agent, as it stands in the story. Where there is none, it was the other way round."""
    told = _story(language, draw, 4)
    event = told[int(draw() * 4)]
    context = _tell(told)
    asked = event.patient if answerable else event.agent
    sentence, text = f"{event.active()} .", str(event.agent)
    answers = {"text": [text], "answer_start": [context.index(sentence)]} if answerable else {"text": [], "answer_start": []}
    return {"id": f"{i:06d}", "title": language.place(draw), "context": context,
            "question": f"who {event.verb.form(event.past, False)} {asked} ?", "answers": answers}  # fmt: skip


def _squad_v2(language: Language, draw: Random, i: int) -> Row:
    return _squad(language, draw, i, answerable=i % 2 == 0)


def _tagged(types: tuple[str, ...]) -> Callable[[Language, Random], tuple[list[str], list[str]]]:
    """Sentences with names of the types given: a person (one word or two), then perhaps a group, a place, a date."""

    def make(language: Language, draw: Random) -> tuple[list[str], list[str]]:
        tokens: list[str] = []
        tags: list[str] = []

        def say(text: str, kind: str | None = None) -> None:
            for j, word in enumerate(text.split()):
                tokens.append(word)
                tags.append("O" if kind is None else f"{'I' if j else 'B'}-{kind}")

        person, group, place = types[:3]
        event = language.event(draw, place=0.0, adjective=0.0)
        name = language.person(draw)
        say(f"{name} {language.person(draw)}" if draw() < 0.3 else name, person)
        if draw() < 0.5:
            say("of")
            say(language.group(draw), group)
        say(f"{event.verb.form(event.past, False)} {event.patient}")
        if draw() < 0.5:
            say("in")
            say(language.place(draw), place)
        if draw() < 0.4:
            adverbs = PAST_ADVERBS if event.past else PRESENT_ADVERBS
            say(adverbs[int(draw() * len(adverbs))], types[3] if len(types) > 3 else None)
        say(".")
        return tokens, tags

    return make


def _conll03(language: Language, draw: Random, i: int) -> Row:
    tokens, tags = _tagged(ENTITY_TYPES["conll03"])(language, draw)
    return {"id": str(i), "tokens": tokens, "ner_tags": tags}


def _ontonotes(language: Language, draw: Random, i: int) -> Row:
    tokens, tags = _tagged(ENTITY_TYPES["ontonotes"])(language, draw)
    return {"tokens": tokens, "tags": tags}


MAKERS: dict[str, Maker] = {
    "cola": _cola, "mrpc": _mrpc, "stsb": _stsb, "rte": _rte, "mnli": _mnli, "sst2": _sst2, "boolq": _boolq, "cb": _cb,
    "multirc": _multirc, "copa": _copa, "squad": _squad, "squad_v2": _squad_v2, "conll03": _conll03,
    "ontonotes": _ontonotes, "sick": _sick,
}  # fmt: skip
