"""Metrics, in percent: those of scikit-learn, scipy and seqeval, and the SQuAD scorer, which is defined here."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np


def classification(gold: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """accuracy, f1 (of class 1 where there are two classes), macro_f1, mcc."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    _same_length(gold, predicted)
    return {
        "accuracy": 100 * accuracy_score(gold, predicted),
        "f1": 100 * f1_score(np.asarray(gold) == 1, np.asarray(predicted) == 1, zero_division=0),
        "macro_f1": 100 * f1_score(gold, predicted, average="macro", zero_division=0),
        "mcc": 100 * matthews_corrcoef(gold, predicted),
    }


def correlation(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """pearson and spearman; both 0 for a constant prediction."""
    from scipy.stats import pearsonr, spearmanr

    _same_length(gold, predicted)
    if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": 100 * float(pearsonr(gold, predicted)[0]), "spearman": 100 * float(spearmanr(gold, predicted)[0])}


def multirc(questions: Sequence[Any], gold: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """f1 and accuracy over all answers; exact_match: share of the questions whose answers are all right.

    questions: the question of each answer.
    """
    right: dict[Any, bool] = {}
    for question, truth, guess in zip(questions, gold, predicted, strict=True):
        right[question] = right.get(question, True) and truth == guess
    values = classification(gold, predicted)
    return {"f1": values["f1"], "exact_match": 100 * sum(right.values()) / len(right), "accuracy": values["accuracy"]}


def entities(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """precision, recall and f1 of whole entities (type and both ends), as in conlleval; tags are B-X, I-X and O."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    gold, predicted = [list(row) for row in gold], [list(row) for row in predicted]
    options = {"average": "micro", "zero_division": 0}
    return {
        "f1": 100 * float(f1_score(gold, predicted, **options)),
        "precision": 100 * float(precision_score(gold, predicted, **options)),
        "recall": 100 * float(recall_score(gold, predicted, **options)),
    }


def squad(
    gold: Sequence[Sequence[str]], predicted: Sequence[str], no_answer: Sequence[float] | None = None
) -> dict[str, float]:
    """Exact match and token F1 against the best of each question's answers; without answers, "" is right.

    no_answer: for v2, the evidence that each question has no answer (0: undecided). A question above 0 is predicted to have
    none. best_exact_match and best_f1 are those of the best threshold on the same data, as in the official script.
    """
    _same_length(gold, predicted)
    pairs = zip(gold, predicted, strict=True)
    answered = np.array([[_exact(answers, guess), _f1(answers, guess)] for answers, guess in pairs])
    if no_answer is None:
        exact, f1 = 100 * answered.mean(axis=0)
        return {"exact_match": float(exact), "f1": float(f1)}
    _same_length(gold, no_answer)
    unanswered = np.array([[not answers] * 2 for answers in gold], dtype=float)
    margin = np.asarray(no_answer, dtype=float)
    exact, f1 = 100 * np.where((margin > 0)[:, None], unanswered, answered).mean(axis=0)
    # A threshold answers the i questions of lowest margin; gains[i - 1] is what that adds to answering none.
    order = np.argsort(margin, kind="stable")
    gains = np.cumsum((answered - unanswered)[order], axis=0)
    # No threshold separates questions of equal margin.
    possible = np.append(margin[order][1:] > margin[order][:-1], True)
    best = 100 * (unanswered.sum(axis=0) + np.maximum(gains[possible].max(axis=0), 0)) / len(margin)
    return {"exact_match": float(exact), "f1": float(f1), "best_exact_match": float(best[0]), "best_f1": float(best[1])}


def normalize(answer: str) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and extra spaces."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def _exact(answers: Sequence[str], guess: str) -> float:
    return float(any(normalize(answer) == normalize(guess) for answer in answers or [""]))


def _f1(answers: Sequence[str], guess: str) -> float:
    def one(answer: str) -> float:
        truth, found = normalize(answer).split(), normalize(guess).split()
        if not truth or not found:
            return float(truth == found)
        common = sum((collections.Counter(truth) & collections.Counter(found)).values())
        return 2 * common / (len(truth) + len(found))

    return max(one(answer) for answer in answers or [""])


def _same_length(gold: Sequence[Any], predicted: Sequence[Any]) -> None:
    if len(gold) != len(predicted) or not len(gold):
        raise ValueError(f"{len(gold)} gold values and {len(predicted)} predictions: expected equal numbers, and at least one")
