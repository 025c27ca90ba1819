"""A generated language: text to pretrain on, and labelled sentences, from a seed and nothing else.

    python -m sctd_ds.eval.grammar --documents 20000 --out data/grammar.txt

The words are invented, the syntax is a small piece of English. What there is to learn:

- a Zipf lexicon, so that most tokens of a text are few words, as in English;
- agreement: a present verb takes the number of its subject, not that of a nearer noun ("the kelbos near the tamp sorate");
- tense, which is the same throughout a document; time adverbs name it only now and then;
- irregular forms: half of the lemmas do not build their plural or past with an ending ("sorate", "mirb");
- reference: pronouns stand for the document's topic; mood: adjectives of a document lean to one polarity;
- meaning: verbs come in pairs of synonyms, nouns have kinds, each verb has an effect ("because ..."), and events are restated
  in the passive.

Probe sentences (`Language.probe`) are split by lemma, as SentEval's are: no verb (tense) or noun (number) of the test part
occurs in the training part, so a bag of words is at chance, and only what pretraining has taught about a word can help.
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
    """A transitive verb. meaning: shared by two synonyms; effect: the meaning of what it brings about."""

    plain: str
    third: str
    past: str
    meaning: int
    effect: int

    def form(self, past: bool, plural: bool) -> str:
        return self.past if past else self.plain if plural else self.third


@dataclass(frozen=True)
class Phrase:
    """A subject or an object: a noun with its number, and the adjective before it ("" for none)."""

    noun: Noun
    plural: bool
    adjective: str = ""

    def __str__(self) -> str:
        return f"the {self.adjective} {self.noun.form(self.plural)}" if self.adjective else f"the {self.noun.form(self.plural)}"


@dataclass(frozen=True)
class Event:
    """Somebody does something to somebody, somewhere ("" for nowhere in particular)."""

    agent: Phrase
    verb: Verb
    patient: Phrase
    place: str
    past: bool

    def active(self, verb: Verb | None = None) -> str:
        """The event in the active voice; verb: a synonym to say it with."""
        return f"{self.agent} {(verb or self.verb).form(self.past, self.agent.plural)} {self.patient}{self._where}"

    def passive(self, verb: Verb | None = None) -> str:
        """The event in the passive voice; the participle is the past form."""
        return f"{self.patient} {be(self.past, self.patient.plural)} {(verb or self.verb).past} by {self.agent}{self._where}"

    @property
    def _where(self) -> str:
        return f" in {self.place}" if self.place else ""


def be(past: bool, plural: bool) -> str:
    return ("were" if plural else "was") if past else ("are" if plural else "is")


def zipf(items: Sequence[T]) -> list[T]:
    """`items` repeated as the Zipf law says, each at least once: a uniform draw from the list is a Zipf draw."""
    total = sum(1 / rank for rank in range(1, len(items) + 1))
    return [item for rank, item in enumerate(items, 1) for _ in range(max(1, round(TABLE / (rank * total))))]


class Language:
    """One language of the family. seed: decides every word; two languages of one seed are the same.

    nouns, verbs, adjectives, names: how many lemmas; `names` counts each of people, places and organisations.
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
            # Verb i and its synonym differ in frequency: they stand half the lexicon apart.
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
        """A noun phrase; good: polarity of its adjective (None: either), adjective: how often it has one."""
        said = pick(self._adjectives[draw() < 0.5 if good is None else good], draw) if draw() < adjective else ""
        return Phrase(pick(self._nouns, draw), draw() < 0.5, said)

    def event(self, draw: Random, *, past: bool | None = None, place: float = 0.3, adjective: float = 0.2) -> Event:
        """An event whose agent and patient are of different lemmas."""
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
        """`count` documents of 3 to 8 sentences, one line each. seed: of the text; the words are the language's own."""
        draw = random.Random(f"sctd_ds text {seed}").random
        for _ in range(count):
            yield self._document(draw)

    def _document(self, draw: Random) -> str:
        past, good, many = draw() < 0.5, draw() < 0.5, draw() < 0.5
        topic = pick(self._nouns, draw)
        pronoun = "they" if many else "she" if topic.kind == "person" else "it"
        nouns, verbs, adverbs = self._nouns, self._verbs, PAST_ADVERBS if past else PRESENT_ADVERBS
        sentences = []
        for i in range(3 + int(draw() * 6)):
            kind = draw()
            if kind < 0.08:
                event = self.event(draw, past=past)
                again = event.passive(self.synonym(event.verb) if draw() < 0.5 else None)
                sentences.append(f"{event.active()} . {again} .")
                continue
            if kind < 0.16:
                event = self.event(draw, past=past, place=0.0)
                effect = self.verb_of(event.verb.effect, draw)
                sentences.append(f"{event.patient} {effect.form(past, event.patient.plural)} because {event.active()} .")
                continue
            # The subject: the topic or its pronoun, another noun, or a name.
            about = draw()
            plural, attractor = many, ""
            if i and about < 0.35:
                subject = pronoun
            elif about < 0.88:
                noun = topic
                if i and about > 0.6:
                    noun, plural = pick(nouns, draw), draw() < 0.5
                said = f"{pick(self._adjectives[good if draw() < 0.9 else not good], draw)} " if draw() < 0.2 else ""
                subject = f"the {said}{noun.form(plural)}"
                if draw() < 0.35:
                    attractor = f" {pick(PLACES, draw)} the {pick(nouns, draw).form(draw() < 0.5)}"
            else:
                subject, plural = pick(self._people, draw), False
                if draw() < 0.3:
                    attractor = f" of {pick(self._groups, draw)}"
            if kind < 0.3:
                negated = draw() < 0.2
                said = pick(self._adjectives[good != negated], draw)
                rest = f"{be(past, plural)} {'not ' if negated else ''}{said}"
            elif kind < 0.36 and subject[:4] == "the ":
                rest = f"{be(past, plural)} {'' if plural else 'a '}{noun.kind}{'s' if plural else ''}"
            else:
                rest = pick(verbs, draw).form(past, plural)
                if draw() < 0.7:
                    rest = f"{rest} the {pick(nouns, draw).form(draw() < 0.5)}"
                if draw() < 0.12:
                    rest = f"{rest} in {pick(self._places, draw)}"
            if draw() < 0.12:
                rest = f"{rest} {pick(adverbs, draw)}"
            sentences.append(f"{subject}{attractor} {rest} .")
        return " ".join(sentences)

    def probe(self, name: Literal["tense", "number"], count: int, split: Split, seed: int = 0) -> list[tuple[str, str]]:
        """`count` labelled sentences (label, sentence), half of each label, from the lemmas of one split.

        "tense": PAST or PRES, of the only verb, with no adverb. "number": NN or NNS, of the subject, beside an attractor of
        random number; its verb is in the past, so that agreement does not tell.
        """
        if name not in ("tense", "number") or split not in SPLITS:
            raise ValueError(f'probe "{name}", split "{split}": expected tense or number, and one of {", ".join(SPLITS)}')
        draw = random.Random(f"sctd_ds probe {name} {split} {seed}").random
        # The split under test is uniform over its lemmas: a Zipf draw would judge a handful of words.
        nouns = [n for i, n in enumerate(self.nouns) if name == "tense" or _split_of(i) == split]
        verbs = [v for i, v in enumerate(self.verbs) if name == "number" or _split_of(i % (len(self.verbs) // 2)) == split]
        examples = []
        for i in range(count):
            marked = i % 2 == 0
            plural, past = (draw() < 0.5, marked) if name == "tense" else (marked, True)
            subject, attractor, thing = (pick(nouns, draw) for _ in range(3))
            verb = pick(verbs, draw)
            sentence = (
                f"the {subject.form(plural)} {pick(PLACES, draw)} the {attractor.form(draw() < 0.5)} "
                f"{verb.form(past, plural)} the {thing.form(draw() < 0.5)} ."
            )
            examples.append((("PAST" if past else "PRES") if name == "tense" else ("NNS" if plural else "NN"), sentence))
        return examples


def pick(items: Sequence[T], draw: Random) -> T:
    return items[int(draw() * len(items))]


def _split_of(lemma: int) -> Split:
    """Three fifths of the lemmas are for training, one each for validation and test; all ranks of frequency are in all."""
    return SPLITS[max(0, lemma % 5 - 2)]


def _words(generator: random.Random) -> Callable[[], str]:
    """Pronounceable words, each given out once, none ending like an inflected form or equal to a function word."""
    seen = set("the near behind beside with once long ago now today these days they she it".split())
    onsets, vowels, codas = (
        "b br d dr f g gl k kl l m n p pl r s sk t tr v z".split(),
        "aeiou",
        ["", "b", "k", "l", "m", "n", "p", "r", "t"],
    )

    def word() -> str:
        while True:
            parts = [generator.choice(onsets) + generator.choice(vowels) + generator.choice(codas)
                     for _ in range(generator.choice((1, 2, 2, 2, 3)))]  # fmt: skip
            made = "".join(parts)
            if len(made) > 3 and made not in seen and made + "s" not in seen and made + "ed" not in seen:
                seen.update((made, made + "s", made + "ed"))
                return made

    return word


def main(arguments: list[str] | None = None) -> int:
    """Write a corpus, documents apart by blank lines: what `python -m sctd_ds.data build` reads."""
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.eval.grammar", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000, help="how many (default: %(default)s)")
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
