"""The method a second time, in plain code: float64, one sequence at a time, no masks, nothing shared.

The tests compare the package with this specification, so it imports nothing from the package. Where the package
masks padding, the oracle never sees it: a sequence here *is* its real tokens. Where the package shares the first
layers between the two passes, the oracle runs each pass from the embeddings on. Layers are numbered from 1, as in
the paper.

Covers Hugging Face's `BertForMaskedLM` (post-norm, erf GELU) and `ModernBertForMaskedLM` (pre-norm, GeGLU, rotary positions,
local attention), with the decoder tied to the word embeddings and without dropout.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

IGNORE = -100
ALWAYS_KEPT = 1e4


@dataclass(frozen=True)
class Sizes:
    """What a BERT's state_dict does not hold: layers, heads, LayerNorm's epsilon, the id whose embedding row is frozen."""

    layers: int
    heads: int
    norm_eps: float = 1e-12
    pad_token_id: int | None = 0


@dataclass(frozen=True)
class ModernSizes(Sizes):
    """The same of a ModernBERT, and `reach`: by layer, how far to each side of itself a token attends, None for everywhere.
    `thetas` are the bases of the rotation in layers with such a limit and in the others."""

    reach: tuple[int | None, ...] = ()
    thetas: tuple[float, float] = (10_000.0, 160_000.0)


@dataclass(frozen=True)
class Method:
    """The settings of the method that one forward pass depends on. `step` is the 1-based optimizer step."""

    mode: str = "align"  # dense | drop | align
    drop_ratio: float = 0.5
    kl_weight: float = 0.05
    objective: str = "paper"  # paper | released
    kl_layers: str = "both"  # both | last (l) | previous (l-1)
    align_schedule: str = "interval"  # interval | spread
    interval: int = 10
    step: int | None = None
    separator: int | None = None
    """The id that ends a document, within which attention stays; None: it sees the whole sequence."""

    @property
    def detach_teacher(self) -> bool:
        """The paper's teacher learns from its own cross-entropy only; the released code also bends it by the KL."""
        return self.objective == "paper"


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `input_ids`, `labels` (-100 where there is none) and, where given, `attention_mask` and
    `token_type_ids`, each [B, S] int64."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What one micro-batch gives.

    `loss` and its `gradients` by parameter name; `label_losses`, the (label, loss) pairs of the pass that feeds the
    importance table; `kept`, the kept positions of each sequence; and the parts of the loss, `ce_full` None where no
    full pass is learned from.
    """

    loss: float
    gradients: dict[str, Tensor]
    label_losses: list[tuple[int, float]]
    kept: list[list[int]]
    ce_dropped: float
    ce_full: float | None
    kl: float


# Selection


def kept_count(length: int, drop_ratio: float) -> int:
    """K = S - floor(S * drop_ratio); S is the padded length of the batch."""
    return length - math.floor(length * drop_ratio)


def select(table: Sequence[float], ids: Sequence[int], real: Sequence[int], count: int) -> list[int]:
    """The `count` real positions with the highest scores, in position order; all of them where there are fewer.

    `ids` are the corrupted input ids. Position 0 ([CLS]) outranks everything; of two equals the earlier one is kept.
    """
    ranked = sorted(real, key=lambda p: (-math.inf if p == 0 else -float(table[ids[p]]), p))
    return sorted(ranked[:count])


# Encoders, one sequence: states are [n, d], one row per token, and `at` says where in the sequence each of them stands


@dataclass(frozen=True)
class Encoder(ABC):
    """Weights by state_dict name and the sizes; every method works on one sequence."""

    weights: Mapping[str, Tensor]
    sizes: Sizes
    documents: Sequence[int]
    """By position, the number of the document that a token belongs to."""
    words: ClassVar[str]
    """The word embeddings' name."""
    tied: ClassVar[Mapping[str, str]]
    """Names of the state_dict that stand for another one's weight."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        product = x @ self.weights[f"{name}.weight"].T
        return product + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else product

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        normal = centred / torch.sqrt(variance + self.sizes.norm_eps) * self.weights[f"{name}.weight"]
        return normal + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else normal

    def word(self, token: int) -> Tensor:
        row = self.weights[self.words][token]
        # nn.Embedding(padding_idx=...) learns nothing for this id through its lookup.
        return row.detach() if token == self.sizes.pad_token_id else row

    @abstractmethod
    def embed(self, ids: Sequence[int], types: Sequence[int], at: Sequence[int]) -> Tensor: ...

    @abstractmethod
    def layer(self, number: int, x: Tensor, at: Sequence[int], source: Tensor, source_at: Sequence[int]) -> Tensor:
        """Encoder layer `number`: queries, residual and feed-forward on `x`; keys and values from `source`."""

    @abstractmethod
    def logits(self, state: Tensor) -> Tensor:
        """[d] a finished state -> [V]."""

    def finish(self, x: Tensor) -> Tensor:
        """What the head and the KL read of a layer's output."""
        return x

    def allowed(self, at: Sequence[int], source_at: Sequence[int], reach: int | None = None) -> Tensor:
        """Which tokens of the source (columns) each token (rows) attends to."""
        return torch.tensor(
            [[self.documents[i] == self.documents[j] and (reach is None or abs(i - j) <= reach) for j in source_at] for i in at]
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """Of one head."""
        scores = query @ key.T / math.sqrt(query.shape[-1])
        return softmax(scores.masked_fill(~allowed, -math.inf)) @ value

    def full_pass(self, x: Tensor, at: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All tokens through all layers. Returns the finished outputs of layers l-1 and l."""
        penultimate = x
        for number in range(1, self.sizes.layers + 1):
            penultimate, x = x, self.layer(number, x, at, x, at)
        return self.finish(penultimate), self.finish(x)

    def dropped_pass(self, x: Tensor, at: Sequence[int], kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Only kept tokens in the middle layers. `kept` indexes rows of `x`. Returns the finished outputs of layers l-1 (kept
        rows) and l (all)."""
        last = self.sizes.layers
        cross = last // 2
        kept_at = [at[p] for p in kept]
        for number in range(1, cross):  # 1 .. l//2 - 1: all tokens
            x = self.layer(number, x, at, x, at)
        y = self.layer(cross, torch.stack([x[p] for p in kept]), kept_at, x, at)  # l//2: kept tokens look at all tokens
        for number in range(cross + 1, last):  # l//2 + 1 .. l - 1: kept tokens among themselves
            y = self.layer(number, y, kept_at, y, kept_at)
        returned = {p: y[slot] for slot, p in enumerate(kept)}
        merged = torch.stack([returned.get(p, x[p]) for p in range(len(x))])  # the dropped ones as layer l//2 - 1 left them
        return self.finish(y), self.finish(self.layer(last, merged, at, merged, at))

    def token_losses(self, x: Tensor, labels: Sequence[int]) -> list[Tensor]:
        """Cross-entropy of every labelled token of one sequence, in position order."""
        losses = []
        for state, label in zip(x, labels, strict=True):
            if label != IGNORE:
                logits = self.logits(state)
                losses.append(torch.logsumexp(logits, dim=0) - logits[label])
        return losses


class Bert(Encoder):
    words = "bert.embeddings.word_embeddings.weight"
    tied: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": words,
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def embed(self, ids: Sequence[int], types: Sequence[int], at: Sequence[int]) -> Tensor:
        rows = []
        for token, segment, position in zip(ids, types, at, strict=True):
            segment_row = self.weights["bert.embeddings.token_type_embeddings.weight"][segment]
            position_row = self.weights["bert.embeddings.position_embeddings.weight"][position]
            rows.append(self.word(token) + segment_row + position_row)
        return self.norm("bert.embeddings.LayerNorm", torch.stack(rows))

    def layer(self, number: int, x: Tensor, at: Sequence[int], source: Tensor, source_at: Sequence[int]) -> Tensor:
        name = f"bert.encoder.layer.{number - 1}"
        query = self.linear(f"{name}.attention.self.query", x)
        key = self.linear(f"{name}.attention.self.key", source)
        value = self.linear(f"{name}.attention.self.value", source)
        parts = zip(*(part.chunk(self.sizes.heads, dim=-1) for part in (query, key, value)), strict=True)
        allowed = self.allowed(at, source_at)
        heads = [self.attend(*part, allowed) for part in parts]
        attended = self.linear(f"{name}.attention.output.dense", torch.cat(heads, dim=-1))
        x = self.norm(f"{name}.attention.output.LayerNorm", attended + x)
        hidden = gelu(self.linear(f"{name}.intermediate.dense", x))
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", hidden) + x)

    def logits(self, state: Tensor) -> Tensor:
        hidden = gelu(self.linear("cls.predictions.transform.dense", state))
        hidden = self.norm("cls.predictions.transform.LayerNorm", hidden)
        return self.weights[self.words] @ hidden + self.weights["cls.predictions.bias"]


class ModernBert(Encoder):
    sizes: ModernSizes
    words = "model.embeddings.tok_embeddings.weight"
    tied: ClassVar[Mapping[str, str]] = {"decoder.weight": words}

    def embed(self, ids: Sequence[int], types: Sequence[int], at: Sequence[int]) -> Tensor:
        return self.norm("model.embeddings.norm", torch.stack([self.word(token) for token in ids]))

    def layer(self, number: int, x: Tensor, at: Sequence[int], source: Tensor, source_at: Sequence[int]) -> Tensor:
        name, reach = f"model.layers.{number - 1}", self.sizes.reach[number - 1]
        theta = self.sizes.thetas[0 if reach is not None else 1]
        allowed = self.allowed(at, source_at, reach)

        def projected(part: int, states: Tensor) -> list[Tensor]:
            """Queries (0), keys (1) or values (2), by head. The first layer does without a norm: the embeddings have one."""
            normal = states if number == 1 else self.norm(f"{name}.attn_norm", states)
            return self.linear(f"{name}.attn.Wqkv", normal).chunk(3, dim=-1)[part].chunk(self.sizes.heads, dim=-1)

        heads = [
            self.attend(rotate(query, at, theta), rotate(key, source_at, theta), value, allowed)
            for query, key, value in zip(projected(0, x), projected(1, source), projected(2, source), strict=True)
        ]
        x = x + self.linear(f"{name}.attn.Wo", torch.cat(heads, dim=-1))
        hidden, gate = self.linear(f"{name}.mlp.Wi", self.norm(f"{name}.mlp_norm", x)).chunk(2, dim=-1)
        return x + self.linear(f"{name}.mlp.Wo", gelu(hidden) * gate)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm("model.final_norm", x)

    def logits(self, state: Tensor) -> Tensor:
        hidden = self.norm("head.norm", gelu(self.linear("head.dense", state)))
        return self.weights[self.words] @ hidden + self.weights["decoder.bias"]


def rotate(x: Tensor, at: Sequence[int], theta: float) -> Tensor:
    """[n, D] of one head, turned by its positions: unit i and unit i + D/2 are a pair. Angles are fp32, the family's own."""
    half = x.shape[-1] // 2
    angles = torch.tensor(at).float()[:, None] * (1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    cos, sin = angles.cos().double(), angles.sin().double()
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax(x: Tensor) -> Tensor:
    exponentials = torch.exp(x - x.max(dim=-1, keepdim=True).values.detach())
    return exponentials / exponentials.sum(-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# Semantic alignment (Eq. 2 and 3)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the d hidden units of one state, [d] and [d] -> scalar."""
    log_p = teacher - torch.logsumexp(teacher, dim=0)
    log_q = student - torch.logsumexp(student, dim=0)
    return (log_p.exp() * (log_p - log_q)).sum()


def sequence_divergence(full: tuple[Tensor, Tensor], dropped: tuple[Tensor, Tensor], method: Method) -> Tensor:
    """KL_{l-1} + KL_l of one sequence's [CLS] states, or the one of them that is learned. Each pass is (layer l-1, layer l)."""
    if method.detach_teacher:
        full = (full[0].detach(), full[1].detach())
    previous, last = divergence(full[0][0], dropped[0][0]), divergence(full[1][0], dropped[1][0])
    if method.kl_layers == "both":
        return previous + last
    return last if method.kl_layers == "last" else previous


# Objective (Eq. 1 and 4) and its gradient


def aligned_rows(rows: int, method: Method) -> list[bool]:
    """Which sequences of the micro-batch have the full pass beside the dropped one."""
    if method.mode != "align":
        return [False] * rows
    if method.align_schedule == "interval":
        return [True] * rows
    assert method.step is not None, "the spread schedule needs the step"
    return [(row + method.step) % method.interval == 0 for row in range(rows)]


def run(
    state_dict: Mapping[str, Tensor], sizes: Sizes, table: Sequence[float] | Tensor, batch: Batch, method: Method
) -> Outcome:
    """Loss and gradients of one micro-batch.

    Args:
        state_dict: of a `BertForMaskedLM`, or with ModernSizes of a `ModernBertForMaskedLM`, with tied decoder, any float
            dtype.
        table: importance score of every vocabulary id, [V].
    """
    family = ModernBert if isinstance(sizes, ModernSizes) else Bert
    leaves = {name: w.detach().double().requires_grad_() for name, w in state_dict.items() if name not in family.tied}
    table = [float(score) for score in table]
    length = batch.input_ids.shape[1]
    count = kept_count(length, method.drop_ratio)
    aligned = aligned_rows(len(batch.input_ids), method)

    loss_sum = torch.zeros((), dtype=torch.float64)  # sums over sequences, weighted as Eq. 4 says
    kl_sum = torch.zeros((), dtype=torch.float64)
    dropped_sum, full_sum, labelled = 0.0, 0.0, 0
    label_losses: list[tuple[int, float]] = []
    all_kept: list[list[int]] = []

    for row, ids in enumerate(batch.input_ids.tolist()):
        mask = [1] * length if batch.attention_mask is None else batch.attention_mask[row].tolist()
        types = [0] * length if batch.token_type_ids is None else batch.token_type_ids[row].tolist()
        real = [p for p in range(length) if mask[p]]
        # A separator ends its document.
        documents = [0 if method.separator is None else ids[:p].count(method.separator) for p in range(length)]
        encoder = family(leaves, sizes, documents)
        labels = [batch.labels[row, p].item() for p in real]
        assert real[0] == 0 and sum(label != IGNORE for label in labels) == (batch.labels[row] != IGNORE).sum()
        x = encoder.embed([ids[p] for p in real], [types[p] for p in real], real)

        if method.mode == "dense":
            kept = real
            dropped = encoder.full_pass(x, real)
        else:
            kept = select(table, ids, real, count)
            dropped = encoder.dropped_pass(x, real, [real.index(p) for p in kept])
        all_kept.append(kept)
        losses = encoder.token_losses(dropped[1], labels)
        row_loss = sum(losses, torch.zeros((), dtype=torch.float64))
        labelled += len(losses)
        dropped_sum += row_loss.item()
        label_losses += zip([label for label in labels if label != IGNORE], [x.item() for x in losses], strict=True)

        if aligned[row]:
            full = encoder.full_pass(x, real)
            kl_sum = kl_sum + sequence_divergence(full, dropped, method)
            if method.objective == "paper":
                full_loss = sum(encoder.token_losses(full[1], labels), torch.zeros((), dtype=torch.float64))
                full_sum += full_loss.item()
                row_loss = row_loss / 2 + full_loss / 2
        loss_sum = loss_sum + row_loss

    # CE is the mean over labelled tokens; the KL is divided by the same number (Eq. 1's weighting).
    kl = kl_sum / labelled
    loss = loss_sum / labelled + method.kl_weight * kl
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Outcome(
        loss=loss.item(),
        gradients=dict(zip(leaves, gradients, strict=True)),
        label_losses=label_losses,
        kept=all_kept,
        ce_dropped=dropped_sum / labelled,
        ce_full=full_sum / labelled if any(aligned) and method.objective == "paper" else None,
        kl=kl.item(),
    )


# Importance


def updated_table(
    table: Sequence[float] | Tensor,
    micro_batches: Iterable[Iterable[tuple[int, float]]],
    decay: float,
    keep_token_ids: Iterable[int],
) -> list[float]:
    """The table after one optimizer step whose micro-batches had these (label, loss of the dropped pass) pairs."""
    by_label: dict[int, list[float]] = {}
    for pairs in micro_batches:
        for label, loss in pairs:
            if math.isfinite(loss):
                by_label.setdefault(label, []).append(loss)
    after = [float(score) for score in table]
    for label, losses in by_label.items():
        after[label] = decay * after[label] + (1 - decay) * sum(losses) / len(losses)
    for label in keep_token_ids:
        after[label] = ALWAYS_KEPT
    return after
