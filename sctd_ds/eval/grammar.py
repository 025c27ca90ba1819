"""A generated language: text to pretrain on, and labelled sentences, determined by a seed.

    python -m sctd_ds.eval.grammar --documents 20000 --out data/grammar.txt

The words are invented, the syntax is a fragment of English. A model can learn:

- a Zipf lexicon: as in English, few words make up most tokens;
- agreement: a present verb takes the number of its subject, not that of a nearer noun ("the kelbos near the tamp sorate");
- tense, which is constant within a document; only a few time adverbs reveal it;
- irregular forms: half of the lemmas have no regular plural or past ending ("sorate", "mirb");
- reference: pronouns refer to the document's topic; sentiment: a document's adjectives tend to one polarity;
- meaning: verbs have synonyms, nouns have kinds, each verb has an effect ("because ..."), and the passive restates events.

Probe sentences (`Language.probe`) are split by lemma, as in SentEval: no verb (tense) or noun (number) of the test split
occurs in the training split, so a bag of words is at chance, and only a word's representation from pretraining can help.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")
Random = Callable[[], float]
Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
KINDS = ("animal", "person", "tool", "plant")
PLACES = ("near", "behind", "beside", "with")
PAST_ADVERBS = ("yesterday", "once", "long ago")
PRESENT_ADVERBS = ("today", "now", "these days")
TABLE = 4096  # resolution of the Zipf law


@dataclass(frozen=True)
class Noun:
    """A common noun. kind: its hypernym, one of KINDS."""

    singular: str
    plural: str
    kind: str

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular


@dataclass(frozen=True)
class Verb:
    """A transitive verb. meaning: a number that two synonyms share; effect: the meaning of the verb that it causes."""

    plain: str
    third: str
    past: str
    meaning: int
    effect: int

    def form(self, past: bool, plural: bool) -> str:
        if past:
            return self.past
        return self.plain if plural else self.third


@dataclass(frozen=True)
class Phrase:
    """A subject or an object: a noun with its number, and the adjective before it ("" for none)."""

    noun: Noun
    plural: bool
    adjective: str = ""

    def __str__(self) -> str:
        adjective = f"{self.adjective} " if self.adjective else ""
        return f"the {adjective}{self.noun.form(self.plural)}"


@dataclass(frozen=True)
class Event:
    """An agent does something to a patient, in a place ("" for none)."""

    agent: Phrase
    verb: Verb
    patient: Phrase
    place: str
    past: bool

    def active(self, verb: Verb | None = None) -> str:
        """The event in the active voice. verb: a synonym to use."""
        return f"{self.agent} {(verb or self.verb).form(self.past, self.agent.plural)} {self.patient}{self._where}"

    def passive(self, verb: Verb | None = None) -> str:
        """The event in the passive voice; the participle is the past form."""
        return f"{self.patient} {be(self.past, self.patient.plural)} {(verb or self.verb).past} by {self.agent}{self._where}"

    @property
    def _where(self) -> str:
        return f" in {self.place}" if self.place else ""


@dataclass(frozen=True)
class Topic:
    """What the sentences of one document share: the noun they are about, its number, tense and polarity."""

    noun: Noun
    plural: bool
    past: bool
    good: bool

    @property
    def pronoun(self) -> str:
        if self.plural:
            return "they"
        return "she" if self.noun.kind == "person" else "it"


@dataclass(frozen=True)
class Subject:
    """The subject of a sentence. noun: None for a pronoun or a name; attractor: what follows it before the verb."""

    text: str
    plural: bool
    noun: Noun | None = None
    attractor: str = ""


def be(past: bool, plural: bool) -> str:
    if past:
        return "were" if plural else "was"
    return "are" if plural else "is"


def zipf(items: Sequence[T]) -> list[T]:
    """`items` repeated in proportion to a Zipf law, each at least once: a uniform draw from the list is a Zipf draw."""
    total = sum(1 / rank for rank in range(1, len(items) + 1))
    repeated: list[T] = []
    for rank, item in enumerate(items, 1):
        repeated += [item] * max(1, round(TABLE / (rank * total)))
    return repeated


class Language:
    """A generated language. seed: decides every word, so languages with the same seed are equal.

    nouns, verbs, adjectives, names: number of lemmas; `names` counts people, places and organisations separately.
    """

    def __init__(self, seed: int = 0, *, nouns: int = 240, verbs: int = 160, adjectives: int = 80, names: int = 40) -> None:
        if min(nouns, verbs, adjectives, names) < 20:
            raise ValueError("a language needs at least 20 nouns, verbs, adjectives and names: the probes split them by lemma")
        generator = random.Random(f"sctd_ds language {seed}")
        word = _words(generator)

        def inflected(ending: str) -> tuple[str, str]:
            stem = word()
            return stem, word() if generator.random() < 0.5 else stem + ending

        self.nouns = [Noun(*inflected("s"), kind=KINDS[i % len(KINDS)]) for i in range(nouns)]
        meanings = verbs // 2
        effects = generator.sample(range(meanings), meanings)
        self.verbs = []
        for i in range(2 * meanings):
            plain, past = inflected("ed")
            # Verb i and its synonym are half the lexicon apart, so they differ in frequency.
            self.verbs.append(Verb(plain, plain + "s", past, i % meanings, effects[i % meanings]))
        self.good = [word() for _ in range(adjectives // 2)]
        self.bad = [word() for _ in range(adjectives // 2)]
        self.people, self.places, self.groups = ([word().capitalize() for _ in range(names)] for _ in range(3))
        self._nouns, self._verbs = zipf(self.nouns), zipf(self.verbs)
        self._adjectives = {True: zipf(self.good), False: zipf(self.bad)}
        self._people, self._places, self._groups = zipf(self.people), zipf(self.places), zipf(self.groups)

    def synonym(self, verb: Verb) -> Verb:
        """The other verb of the same meaning."""
        half = len(self.verbs) // 2
        return self.verbs[verb.meaning + half] if self.verbs[verb.meaning] is verb else self.verbs[verb.meaning]

    def verb_of(self, meaning: int, draw: Random) -> Verb:
        return self.verbs[meaning + (len(self.verbs) // 2 if draw() < 0.3 else 0)]

    def phrase(self, draw: Random, *, good: bool | None = None, adjective: float = 0.2) -> Phrase:
        """A noun phrase. good: polarity of its adjective (None: either); adjective: the probability that it has one."""
        word = ""
        if draw() < adjective:
            word = self.adjective(draw, draw() < 0.5 if good is None else good)
        return Phrase(pick(self._nouns, draw), draw() < 0.5, word)

    def event(self, draw: Random, *, past: bool | None = None, place: float = 0.3, adjective: float = 0.2) -> Event:
        """An event whose agent and patient have different nouns."""
        agent = patient = self.phrase(draw, adjective=adjective)
        while patient.noun is agent.noun:
            patient = self.phrase(draw, adjective=adjective)
        where = pick(self._places, draw) if draw() < place else ""
        return Event(agent, pick(self._verbs, draw), patient, where, draw() < 0.5 if past is None else past)

    def person(self, draw: Random) -> str:
        return pick(self._people, draw)

    def place(self, draw: Random) -> str:
        return pick(self._places, draw)

    def group(self, draw: Random) -> str:
        return pick(self._groups, draw)

    def adjective(self, draw: Random, good: bool) -> str:
        return pick(self._adjectives[good], draw)

    def documents(self, count: int, seed: int = 0) -> Iterator[str]:
        """`count` documents of 3 to 8 sentences, one line each. seed: of the text, not of the words."""
        draw = random.Random(f"sctd_ds text {seed}").random
        for _ in range(count):
            yield self._document(draw)

    def _document(self, draw: Random) -> str:
        past, good, plural = draw() < 0.5, draw() < 0.5, draw() < 0.5
        topic = Topic(pick(self._nouns, draw), plural, past, good)
        sentences = []
        for i in range(3 + int(draw() * 6)):
            form = draw()
            if form < 0.08:
                sentences.append(self._restatement(draw, past))
            elif form < 0.16:
                sentences.append(self._explanation(draw, past))
            else:
                subject = self._subject(draw, topic, first=i == 0)
                predicate = self._predicate(draw, topic, subject, form)
                sentences.append(f"{subject.text}{subject.attractor} {predicate} .")
        return " ".join(sentences)

    def _restatement(self, draw: Random, past: bool) -> str:
        """An event, and the same in the passive voice."""
        event = self.event(draw, past=past)
        synonym = self.synonym(event.verb) if draw() < 0.5 else None
        return f"{event.active()} . {event.passive(synonym)} ."

    def _explanation(self, draw: Random, past: bool) -> str:
        """The effect of an event, because of the event."""
        event = self.event(draw, past=past, place=0.0)
        effect = self.verb_of(event.verb.effect, draw)
        return f"{event.patient} {effect.form(past, event.patient.plural)} because {event.active()} ."

    def _subject(self, draw: Random, topic: Topic, first: bool) -> Subject:
        """The topic or its pronoun, another noun, or a name. first: of the document's first sentence, the topic or a name."""
        about = draw()
        if about < 0.35 and not first:
            return Subject(topic.pronoun, topic.plural)
        if about >= 0.88:
            name = pick(self._people, draw)
            attractor = f" of {pick(self._groups, draw)}" if draw() < 0.3 else ""
            return Subject(name, False, attractor=attractor)
        noun, plural = topic.noun, topic.plural
        if about > 0.6 and not first:
            noun, plural = pick(self._nouns, draw), draw() < 0.5
        adjective = ""
        if draw() < 0.2:
            adjective = self.adjective(draw, topic.good if draw() < 0.9 else not topic.good) + " "
        attractor = ""
        if draw() < 0.35:
            attractor = f" {pick(PLACES, draw)} the {pick(self._nouns, draw).form(draw() < 0.5)}"
        return Subject(f"the {adjective}{noun.form(plural)}", plural, noun, attractor)

    def _predicate(self, draw: Random, topic: Topic, subject: Subject, form: float) -> str:
        """An adjective, the kind of the subject's noun, or a verb with perhaps an object; perhaps an adverb of time."""
        past, plural = topic.past, subject.plural
        if form < 0.3:
            negated = draw() < 0.2
            adjective = self.adjective(draw, topic.good != negated)
            text = f"{be(past, plural)} {'not ' if negated else ''}{adjective}"
        elif form < 0.36 and subject.noun is not None:
            kind = f"{subject.noun.kind}s" if plural else f"a {subject.noun.kind}"
            text = f"{be(past, plural)} {kind}"
        else:
            text = pick(self._verbs, draw).form(past, plural)
            if draw() < 0.7:
                text += f" the {pick(self._nouns, draw).form(draw() < 0.5)}"
            if draw() < 0.12:
                text += f" in {self.place(draw)}"
        if draw() < 0.12:
            text += f" {pick(PAST_ADVERBS if past else PRESENT_ADVERBS, draw)}"
        return text

    def probe(self, name: Literal["tense", "number"], count: int, split: Split, seed: int = 0) -> list[tuple[str, str]]:
        """`count` labelled sentences (label, sentence), half with each label, from the lemmas of one split.

        "tense": PAST or PRES, of the only verb, without an adverb. "number": NN or NNS, of the subject, with
        an attractor of random number; the verb is in the past, so agreement does not reveal the number.
        """
        if name not in ("tense", "number") or split not in SPLITS:
            raise ValueError(f'probe "{name}", split "{split}": expected tense or number, and one of {", ".join(SPLITS)}')
        draw = random.Random(f"sctd_ds probe {name} {split} {seed}").random
        # Draws are uniform over the lemmas of the split: Zipf draws would test only a few words.
        half = len(self.verbs) // 2
        nouns = [noun for i, noun in enumerate(self.nouns) if name == "tense" or _split_of(i) == split]
        verbs = [verb for i, verb in enumerate(self.verbs) if name == "number" or _split_of(i % half) == split]
        examples = []
        for i in range(count):
            if name == "tense":
                past = i % 2 == 0
                plural = draw() < 0.5
                label = "PAST" if past else "PRES"
            else:
                past, plural = True, i % 2 == 0
                label = "NNS" if plural else "NN"
            subject, attractor, thing = (pick(nouns, draw) for _ in range(3))
            verb = pick(verbs, draw)
            sentence = (
                f"the {subject.form(plural)} {pick(PLACES, draw)} the {attractor.form(draw() < 0.5)} "
                f"{verb.form(past, plural)} the {thing.form(draw() < 0.5)} ."
            )
            examples.append((label, sentence))
        return examples


def pick(items: Sequence[T], draw: Random) -> T:
    return items[int(draw() * len(items))]


def _split_of(lemma: int) -> Split:
    """Three fifths of the lemmas are for training, one fifth each for validation and test, at all frequencies."""
    return SPLITS[max(0, lemma % 5 - 2)]


def _words(generator: random.Random) -> Callable[[], str]:
    """A generator of distinct pronounceable words, no inflected form of another and no function word."""
    seen = set("the near behind beside with once long ago now today these days they she it".split())
    onsets = "b br d dr f g gl k kl l m n p pl r s sk t tr v z".split()
    vowels = "aeiou"
    codas = ["", "b", "k", "l", "m", "n", "p", "r", "t"]

    def word() -> str:
        while True:
            new = ""
            for _ in range(generator.choice((1, 2, 2, 2, 3))):
                new += generator.choice(onsets) + generator.choice(vowels) + generator.choice(codas)
            forms = {new, new + "s", new + "ed"}
            if len(new) > 3 and not forms & seen:
                seen.update(forms)
                return new

    return word


def main(arguments: list[str] | None = None) -> int:
    """Write a text file with blank lines between documents, for `python -m sctd_ds.data build`."""
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.eval.grammar", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000, help="number of documents (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text (default: %(default)s)")
    parser.add_argument("--language", type=int, default=0, help="seed of the words (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the text file to write")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for document in Language(options.language).documents(options.documents, options.seed):
            file.write(document + "\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
