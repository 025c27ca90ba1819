"""Scores of a model while it trains: linear probes on its frozen states, from local files.

A probe takes seconds, where fine-tuning takes minutes, and says whether the states hold what a word is, not only which word
fits. It is that of `analysis.probe` on one layer of the full pass, with fewer examples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sctd_ds.eval.analysis import Examples, by_length, drawn, linear_probe
from sctd_ds.eval.sources import EvalError, load_probe
from sctd_ds.eval.tasks import PROBES
from sctd_ds.method.convert import state_of

TRAIN, EVAL = 2000, 1000
"""At most so many examples to train a probe, and to choose its penalty and to test it."""


def load(folder: str) -> dict[str, Examples]:
    """The probing tasks whose files are in a folder, by name. Raises EvalError for none, and for a damaged file."""
    files = {name: Path(folder, file) for name, (file, _) in PROBES.items()}
    found = [name for name, file in files.items() if file.is_file()]
    if not found:
        raise EvalError(
            f'pretrain.evaluate="{folder}": expected {" or ".join(map(str, files.values()))}, of SentEval or written by '
            f"`python -m sctd_ds.eval synthetic --to {folder}`"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise EvalError("pretrain.evaluate: scikit-learn is not installed: pip install sctd_ds[eval]")
    return {name: drawn(load_probe(name, Path(folder)), seed=0, max_train=TRAIN, max_eval=EVAL) for name in found}


@torch.no_grad()
def score(model: Any, tokenizer: Any, tasks: Mapping[str, Examples], longest: int) -> dict[str, float]:
    """Test accuracy (%) of a linear probe on the mean of a sentence's states after layer l-1, by task.

    model: a converted masked LM; it stays in training or evaluation, and nothing random is drawn. longest: tokens of a
    sentence that are read.
    """
    training = model.training
    model.eval()
    found = {}
    for name, examples in tasks.items():
        features = {split: _embed(model, tokenizer, [text for _, text in rows], longest) for split, rows in examples.items()}
        found[name] = linear_probe(features, {split: [label for label, _ in rows] for split, rows in examples.items()})
    model.train(training)
    return found


def _embed(model: Any, tokenizer: Any, sentences: Sequence[str], longest: int) -> np.ndarray:
    """[N, d] fp32."""
    network, norm = model.base_model, state_of(model).adapter.final_norm  # without the head
    device = next(network.parameters()).device
    found = np.empty((len(sentences), network.config.hidden_size), dtype=np.float32)
    for numbers, ids in by_length(tokenizer, sentences, longest):
        states = network(input_ids=ids.to(device), output_hidden_states=True).hidden_states[-2]
        found[numbers] = norm(states).float().mean(dim=1).cpu().numpy()
    return found
