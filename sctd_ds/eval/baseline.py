"""The bag-of-words baseline: a linear model on word counts, for every task to which it applies.

A model that scores no higher has not shown that it uses structure, and a synthetic task that requires structure must leave
this baseline at chance. The features of a pair are the words of each text, the shared ones, and those of one text only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sctd_ds.eval import scores
from sctd_ds.eval.sources import Row
from sctd_ds.eval.tasks import Task


def bag_of_words(task: Task, data: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Scores (%) on the task's first evaluation split by metric, as `scores` names them, after training on data["train"].

    Tagging predicts each word's most frequent tag. For spans, "answerable" is the accuracy of
    predicting whether an answer exists; a task in which it always does has no score.
    """
    train, test = data["train"], data[task.splits[0]]
    if task.kind == "tag":
        return _frequent_tags(task, train, test)
    if task.kind == "choose":
        return _chosen(train, test)
    if task.kind == "span" and not task.no_answer:
        return {}

    def gold(rows: Sequence[Row]) -> list[Any]:
        return [bool(row["answers"]["text"]) if task.kind == "span" else row[task.label] for row in rows]

    bags = [_bag([row[column] for column in task.inputs]) for row in (*train, *test)]
    if task.kind == "regress":
        return scores.correlation(gold(test), _fit(bags, gold(train), regression=True).tolist())
    predicted = _fit(bags, gold(train)).argmax(axis=1).tolist()
    if task.kind == "span":
        return {"answerable": scores.classification(gold(test), predicted)["accuracy"]}
    if task.name == "multirc":
        return scores.multirc([row["question_id"] for row in test], gold(test), predicted)
    return scores.classification(gold(test), predicted)


def _bag(texts: Sequence[str]) -> dict[str, int]:
    """Word counts by feature name."""
    words = [Counter(text.split()) for text in texts]
    bag = {f"{i} {word}": count for i, counts in enumerate(words) for word, count in counts.items()}
    if len(words) > 1:
        first, others = set(words[0]), set().union(*words[1:])
        bag |= {f"both {word}": 1 for word in first & others} | {f"one {word}": 1 for word in first ^ others}
        bag |= {"shared": len(first & others), "different": len(first ^ others)}
    return bag


def _fit(bags: Sequence[dict[str, int]], gold: Sequence[Any], regression: bool = False) -> np.ndarray:
    """Train on the first len(gold) bags and predict the others: probabilities [N, classes], or values [N]."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    learner = Ridge(alpha=1.0) if regression else LogisticRegression(max_iter=500)
    model = make_pipeline(DictVectorizer(), MaxAbsScaler(), learner).fit(bags[: len(gold)], gold)
    rest = bags[len(gold) :]
    return model.predict(rest) if regression else model.predict_proba(rest)


def _chosen(train: Sequence[Row], test: Sequence[Row]) -> dict[str, float]:
    """Score each choice separately, and choose the more likely one."""
    pairs = [(row, row[choice]) for row in (*train, *test) for choice in ("choice1", "choice2")]
    bags = [_bag([row["premise"], f"{row['question']} {choice}"]) for row, choice in pairs]
    right = [int(row["label"] == i) for row in train for i in (0, 1)]
    likely = _fit(bags, right)[:, 1].reshape(-1, 2)
    return scores.classification([row["label"] for row in test], likely.argmax(axis=1).tolist())


def _frequent_tags(task: Task, train: Sequence[Row], test: Sequence[Row]) -> dict[str, float]:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row[task.label], strict=True):
            seen[word][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    predicted = [[best.get(word, "O") for word in row["tokens"]] for row in test]
    return scores.entities([row[task.label] for row in test], predicted)
