"""The generated language: determined by its seed, fast, grammatical, and at chance for a bag of words."""

import random
import time
from collections import Counter

import pytest

from sctd_ds.eval.grammar import SPLITS, Language, be, main


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


def test_seeds_decide_words_and_text(language):
    assert list(language.documents(50, seed=1)) == list(Language().documents(50, seed=1))
    assert list(language.documents(50, seed=1)) != list(language.documents(50, seed=2))
    assert language.nouns != Language(1).nouns


def test_documents_have_three_to_eight_sentences_or_restatements(language):
    # A restatement adds one sentence to its original.
    lengths = [document.count(" .") for document in language.documents(2000)]
    assert min(lengths) == 3 and max(lengths) > 8 and 4.5 < sum(lengths) / len(lengths) < 7


def test_forms_are_unique_and_half_are_irregular(language):
    nouns = [form for noun in language.nouns for form in (noun.singular, noun.plural)]
    verbs = [form for verb in language.verbs for form in (verb.plain, verb.third, verb.past)]
    assert len(set(nouns + verbs)) == len(nouns + verbs)
    irregular = [n.plural != n.singular + "s" for n in language.nouns] + [v.past != v.plain + "ed" for v in language.verbs]
    assert 0.4 < sum(irregular) / len(irregular) < 0.6


def test_present_verbs_agree_with_the_subject_and_not_with_the_attractor(language):
    singular = {n.singular for n in language.nouns}
    third = {v.third for v in language.verbs}
    plain = {v.plain for v in language.verbs}
    seen = Counter()
    for document in language.documents(3000, seed=5):
        for sentence in document.split(" ."):
            words = sentence.split()
            verbs = [w for w in words if w in third or w in plain]
            if len(words) > 5 and words[0] == "the" and words[2] in ("near", "behind", "beside", "with") and verbs:
                assert (words[1] in singular) == (verbs[0] in third), sentence
                seen[words[1] in singular, words[4] in singular] += 1
    assert len(seen) == 4 and min(seen.values()) > 50  # attractors of both numbers, beside subjects of both


def test_a_document_has_one_tense(language):
    past = {v.past for v in language.verbs} | {"was", "were"}
    present = {f for v in language.verbs for f in (v.plain, v.third)} | {"is", "are"}
    for document in language.documents(1000, seed=3):
        # The participle of a present passive is a past form; such documents say "is" or "are" too.
        words = set(document.split())
        assert not (words & present and words & past - {w for w in words if f" {w} by" in document}), document


def test_frequencies_follow_zipf(language):
    counts = Counter(word for document in language.documents(5000) for word in document.split())
    first, tenth = (counts[language.nouns[i].singular] + counts[language.nouns[i].plural] for i in (0, 9))
    assert 5 < first / tenth < 20
    rarest = sum(counts[n.singular] + counts[n.plural] for n in language.nouns[-20:]) / 20
    assert rarest > 5  # pretraining sees every lemma of a probe


def test_events_say_the_same_in_both_voices(language):
    event = language.event(random.Random(0).random, past=True, place=0.0, adjective=0.0)
    assert event.active() == f"{event.agent} {event.verb.past} {event.patient}"
    assert event.passive() == f"{event.patient} {be(True, event.patient.plural)} {event.verb.past} by {event.agent}"
    other = language.synonym(event.verb)
    assert other is not event.verb and other.meaning == event.verb.meaning and language.synonym(other) is event.verb


@pytest.mark.parametrize("name", ["tense", "number"])
def test_a_bag_of_words_is_at_chance_on_the_probes(language, name):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = language.probe(name, 2000, "train"), language.probe(name, 1000, "test")
    for examples in (train, test):
        counts = Counter(label for label, _ in examples)
        assert len(counts) == 2 and len(set(counts.values())) == 1
    bag = CountVectorizer(token_pattern=r"\S+")
    model = LogisticRegression(max_iter=500).fit(bag.fit_transform([s for _, s in train]), [label for label, _ in train])
    accuracy = {
        name: model.score(bag.transform([s for _, s in part]), [label for label, _ in part])
        for name, part in (("train", train), ("test", test))
    }
    # It fits the training split, though for number it also sees the attractor's, and fails on new words.
    assert accuracy["train"] > 0.75 and abs(accuracy["test"] - 0.5) < 0.05


@pytest.mark.parametrize("name", ["tense", "number"])
def test_probe_lemmas_of_the_splits_are_disjoint(language, name):
    lemmas = language.verbs if name == "tense" else language.nouns
    forms = [
        (i, vars(lemma)[key])
        for i, lemma in enumerate(lemmas)
        for key in (("plain", "third", "past") if name == "tense" else ("singular", "plural"))
    ]
    lemma_of = {form: i for i, form in forms}
    used = [{lemma_of[w] for _, s in language.probe(name, 3000, split) for w in s.split() if w in lemma_of} for split in SPLITS]
    assert not (used[0] & used[1] or used[0] & used[2] or used[1] & used[2])
    assert all(len(part) >= 0.15 * len(lemmas) for part in used)


def test_generation_is_fast(language):
    start = time.process_time()
    sentences = sum(document.count(" .") for document in language.documents(5000))
    # About 200,000 sentences/s on one core of 2023; the bound leaves room for a slow machine.
    assert sentences / (time.process_time() - start) > 30_000


def test_command_writes_a_corpus_that_the_data_part_reads(tmp_path):
    from sctd_ds import data

    assert main(["--documents", "300", "--out", str(tmp_path / "text.txt")]) == 0
    built = data.load(data.build([str(tmp_path / "text.txt")], tmp_path / "built", vocab_size=2000, seq_length=64))
    assert built.meta.documents == 300 and built.meta.unknown_share < 0.001


@pytest.mark.parametrize(
    "wrong, message",
    [(lambda: Language(nouns=5), "at least 20"), (lambda: Language().probe("mood", 2, "train"), "tense or number")],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
