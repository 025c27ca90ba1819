"""Synthetic tasks: a copy of every task in the generated language, with the columns and labels of the real data set.

They test the whole evaluation without a download and separate models at small scale: the language's documents contain what
each task requires (agreement, roles, voice, synonyms, kinds, negation, reference to a text). Labels are balanced.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sctd_ds.eval.grammar import KINDS, PAST_ADVERBS, PRESENT_ADVERBS, Event, Language, Phrase, Random, be, pick
from sctd_ds.eval.tasks import PROBES, TASKS

Row = dict[str, Any]
Maker = Callable[[Language, Random, int], Row]
MARK = "SYNTHETIC"
"""The name of a file that marks a folder of synthetic tasks, so that no report presents them as the real data."""
ENTITY_TYPES = {"conll03": ("PER", "ORG", "LOC"), "ontonotes": ("PERSON", "ORG", "GPE", "DATE")}


def generate(name: str, split: str, count: int, language: Language | None = None, seed: int = 0) -> list[Row]:
    """`count` rows of a synthetic task. Splits are independent draws over the same words."""
    language = language or Language()
    rows = []
    for i in range(count):
        # Both answers to a question of MultiRC share a generator, and so a story.
        source = i // 2 if name == "multirc" else i
        # Another word than "twin" in this seed would generate other rows than those of recorded results.
        draw = random.Random(f"sctd_ds twin {name} {split} {seed} {source}").random
        rows.append(MAKERS[name](language, draw, i))
    return rows


def write(folder: Path, *, train: int = 2000, validation: int = 500, language: Language | None = None, seed: int = 0) -> None:
    """Write all synthetic tasks as JSON lines where `sources.load` expects them, and both probes in SentEval's format."""
    language = language or Language()
    folder.mkdir(parents=True, exist_ok=True)
    note = "Synthetic tasks made by `python -m sctd_ds.eval synthetic`; not the data sets they are named after.\n"
    (folder / MARK).write_text(note, encoding="utf-8")
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", *task.splits):
            rows = generate(name, split, train if split == "train" else validation, language, seed)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for name, (file, _) in PROBES.items():
        lines = []
        for split, short in (("train", "tr"), ("validation", "va"), ("test", "te")):
            count = train if split == "train" else validation
            for label, sentence in language.probe(name, count, split, seed):  # type: ignore[arg-type]
                lines.append(f"{short}\t{label}\t{sentence}\n")
        (folder / file).write_text("".join(lines), encoding="utf-8")


def _cola(language: Language, draw: Random, i: int) -> Row:
    """Acceptable: the present verb agrees with its subject, not with the attractor between them."""
    event = language.event(draw, past=False)
    attractor = Phrase(language.phrase(draw).noun, not event.agent.plural)
    right = i % 2
    verb = event.verb.form(False, event.agent.plural if right else not event.agent.plural)
    return {"sentence": f"{event.agent} near {attractor} {verb} {event.patient} .", "label": right, "idx": i}


def _sst2(language: Language, draw: Random, i: int) -> Row:
    """The polarity of the predicate, which "not" inverts; the subject's adjective may have the opposite polarity."""
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
    """Equivalent: the same event in another voice or with a synonym. Otherwise agent and patient are exchanged."""
    event = language.event(draw)
    other = event if i % 2 else _swapped(event)
    return {"sentence1": event.active() + " .", "sentence2": _paraphrase(language, draw, other), "label": i % 2, "idx": i}


def _similar(language: Language, draw: Random, i: int) -> tuple[str, str, int]:
    """Two events that share `i % 6` of agent, verb, patient, place and tense; the second is a paraphrase."""
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
    """A premise, affirmed or denied, and a hypothesis of mostly the same words.

    Entailment: the hypothesis paraphrases the premise, or replaces the agent by its kind. Contradiction: it negates
    the premise, or names another kind. Neutral: it exchanges the roles, mostly with the premise's polarity.
    """
    event = language.event(draw, adjective=0.0)
    agent, entailed = event.agent, relation == "entailment"
    if relation != "neutral" and draw() < 0.4:
        kind = pick([kind for kind in KINDS if (kind == agent.noun.kind) == entailed], draw)
        named = f"{kind}s" if agent.plural else f"a {kind}"
        return event.active() + " .", f"{named} {event.verb.form(event.past, agent.plural)} {event.patient} ."
    denied = draw() < 0.4
    claimed, same_polarity = (_swapped(event), draw() < 0.8) if relation == "neutral" else (event, entailed)
    hypothesis = _denied(claimed) if denied == same_polarity else _paraphrase(language, draw, claimed)
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
    distractor = f"{language.person(draw)} {'was' if draw() < 0.5 else 'is'} {language.adjective(draw, True)} ."
    return {"premise": f"{distractor} {one}", "hypothesis": two, "idx": i, "label": i % 3}


def _story(language: Language, draw: Random, events: int, place: float = 0.3) -> list[Event]:
    """Events of one tense with different agents, verbs and patients, so that a question has one answer."""
    past = draw() < 0.5
    story: list[Event] = []
    while len(story) < events:
        event = language.event(draw, past=past, place=place, adjective=0.0)
        new = (event.agent.noun, event.patient.noun, event.verb.meaning)
        known = [(e.agent.noun, e.patient.noun, e.verb.meaning) for e in story]
        if not any(a == b for old in known for a, b in zip(new, old, strict=True)):
            story.append(event)
    return story


def _text(story: list[Event]) -> str:
    return " ".join(f"{event.active()} ." for event in story)


def _boolq(language: Language, draw: Random, i: int) -> Row:
    """True: the question states an event of the story. False: it exchanges agent and patient."""
    story = _story(language, draw, 4)
    event = story[int(draw() * 4)]
    asked = event if i % 2 else _swapped(event)
    question = f"{be(event.past, asked.patient.plural)} {asked.patient} {event.verb.past} by {asked.agent}"
    return {"question": question, "passage": _text(story), "idx": i, "label": i % 2}


def _multirc(language: Language, draw: Random, i: int) -> Row:
    """Two answers to each question: the patient of the event in question, and that of another event of the story."""
    right = i % 2
    event, *others = _story(language, draw, 4)
    story = sorted([event, *others], key=lambda e: e.verb.plain)
    return {
        "paragraph": _text(story),
        "question": f"who {be(event.past, False)} {event.verb.past} by {event.agent}",
        "answer": str((event if right else others[0]).patient),
        "idx": {"paragraph": i // 2, "question": i // 2, "answer": i},
        "label": right,
    }


def _copa(language: Language, draw: Random, i: int) -> Row:
    """The effect or the cause of an event; documents state both ("... because ...").

    The wrong choice has the same distribution as the right one, so no verb is right more often than another.
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

    if draw() < 0.5:
        question, premise, right, other = "cause", happened(effect), did(cause.verb), did(wrong)
    else:
        other_effect = language.verb_of(wrong.effect, draw)
        question, premise, right, other = "effect", did(cause.verb), happened(effect), happened(other_effect)
    one, two = (right, other) if i % 2 == 0 else (other, right)
    return {"premise": premise, "choice1": one, "choice2": two, "question": question, "idx": i, "label": i % 2}


def _squad(language: Language, draw: Random, i: int, answerable: bool = True) -> Row:
    """The question asks for an event's agent, as it appears in the story. Without an answer, it exchanges the roles."""
    story = _story(language, draw, 4)
    event = story[int(draw() * 4)]
    context = _text(story)
    asked = event.patient if answerable else event.agent
    texts = [str(event.agent)] if answerable else []
    starts = [context.index(f"{event.active()} .")] if answerable else []
    return {
        "id": f"{i:06d}",
        "title": language.place(draw),
        "context": context,
        "question": f"who {event.verb.form(event.past, False)} {asked} ?",
        "answers": {"text": texts, "answer_start": starts},
    }


def _squad_v2(language: Language, draw: Random, i: int) -> Row:
    return _squad(language, draw, i, answerable=i % 2 == 0)


def _tagged(types: tuple[str, ...]) -> Callable[[Language, Random], tuple[list[str], list[str]]]:
    """A maker of sentences with names of these types: a person (one or two words), perhaps a group, a place, a date."""

    def make(language: Language, draw: Random) -> tuple[list[str], list[str]]:
        tokens: list[str] = []
        tags: list[str] = []

        def add(text: str, entity: str | None = None) -> None:
            for j, word in enumerate(text.split()):
                tokens.append(word)
                tags.append("O" if entity is None else f"{'I' if j else 'B'}-{entity}")

        person, group, place = types[:3]
        event = language.event(draw, place=0.0, adjective=0.0)
        name = language.person(draw)
        add(f"{name} {language.person(draw)}" if draw() < 0.3 else name, person)
        if draw() < 0.5:
            add("of")
            add(language.group(draw), group)
        add(f"{event.verb.form(event.past, False)} {event.patient}")
        if draw() < 0.5:
            add("in")
            add(language.place(draw), place)
        if draw() < 0.4:
            adverbs = PAST_ADVERBS if event.past else PRESENT_ADVERBS
            add(pick(adverbs, draw), types[3] if len(types) > 3 else None)
        add(".")
        return tokens, tags

    return make


def _conll03(language: Language, draw: Random, i: int) -> Row:
    tokens, tags = _tagged(ENTITY_TYPES["conll03"])(language, draw)
    return {"id": str(i), "tokens": tokens, "ner_tags": tags}


def _ontonotes(language: Language, draw: Random, i: int) -> Row:
    tokens, tags = _tagged(ENTITY_TYPES["ontonotes"])(language, draw)
    return {"tokens": tokens, "tags": tags}


MAKERS: dict[str, Maker] = {
    "cola": _cola,
    "mrpc": _mrpc,
    "stsb": _stsb,
    "rte": _rte,
    "mnli": _mnli,
    "sst2": _sst2,
    "boolq": _boolq,
    "cb": _cb,
    "multirc": _multirc,
    "copa": _copa,
    "squad": _squad,
    "squad_v2": _squad_v2,
    "conll03": _conll03,
    "ontonotes": _ontonotes,
    "sick": _sick,
}
