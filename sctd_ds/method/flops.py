"""How many floating-point operations a step takes, by the layer plan that the training step follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sctd_ds.adapters.architectures import ARCHITECTURES, PLAIN, Operations
from sctd_ds.config import ScTDConfig
from sctd_ds.method.plan import LayerPlan, Region, kept_tokens
from sctd_ds.method.schedule import Mode, mean_cost, modes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the cost of a step: the encoder's, the row's, and the labelled tokens of a row."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    length: int
    labels: int
    operations: Operations = PLAIN

    @classmethod
    def of(cls, config: PreTrainedConfig, *, length: int, labels: int) -> Shape:
        """The shape of a model that pretrain.py trains, from its transformers configuration."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            length=length,
            labels=labels,
            operations=ARCHITECTURES[config.model_type].operations(config),
        )

    def window(self, layer: int) -> int:
        """How far to each side of itself a token attends in this layer (from 0)."""
        windows, most = self.operations.windows, self.length - 1
        reach = windows[layer] if layer < len(windows) else None
        return most if reach is None else min(reach, most)

    def pairs(self, queries: int, keys: int, window: int) -> float:
        """Pairs of a query and a key at most `window` apart, if queries are some of the keys and keys some of the row's
        tokens, each choice equally likely; all pairs where the window spans the row."""
        s = self.length
        ordered = window * (2 * s - window - 1)  # of different tokens of the row
        return queries + ordered * queries * (keys - 1) / (s * (s - 1))


def sequence_flops(shape: Shape, config: ScTDConfig, mode: Mode, head_rows: int | None = None) -> float:
    """Floating-point operations of one sequence, forward and backward; see `part_flops`."""
    return sum(part_flops(shape, config, mode, head_rows))


def part_flops(shape: Shape, config: ScTDConfig, mode: Mode, head_rows: int | None = None) -> list[float]:
    """Operations of one sequence in each encoder layer and, last, in the head: forward, and twice as many backward.

    A product of [m, k] and [k, n] counts 2mkn; attention counts 4 * hidden for each pair of a query and a key that it attends
    to; normalisation, rotation, activation and softmax count nothing. In a layer of local attention only the pairs within
    the window count: what the mathematics needs, which is less than a kernel does that computes all pairs and masks some.
    head_rows: rows that the output head of a plain model runs on, whose last layer runs everywhere (default: the labelled
    rows, and the last layer as `config` says). With the "spread" schedule an "align" sequence is the average over one row
    that aligns and interval - 1 rows that do not.
    """
    d, f, s = shape.hidden, shape.intermediate, shape.length
    k = kept_tokens(s, config.drop_ratio)
    narrow = head_rows is None and config.last_layer == "labelled"
    last_queries = min(shape.labels + 1, s) if narrow else s
    queries_and_keys: dict[Region, tuple[int, int]] = {
        "full": (s, s),
        "cross": (k, s),
        "kept": (k, k),
        "last": (last_queries, s),
    }
    plan = LayerPlan(shape.layers, drops=mode != "dense")
    head = 2 * (shape.labels if head_rows is None else head_rows) * d * (d + shape.vocabulary)

    feed_forward = (6 if shape.operations.gated else 4) * d * f

    def layer(i: int, region: Region) -> float:
        queries, keys = queries_and_keys[region]
        pairs = shape.pairs(queries, keys, shape.window(i))
        return 4 * queries * d * d + 4 * keys * d * d + queries * feed_forward + 4 * pairs * d

    full = [layer(i, "last" if i == plan.last else "full") for i in range(shape.layers)] + [head]
    if mode == "dense":
        return [3 * flops for flops in full]
    dropped = [layer(i, plan.region(i)) for i in range(shape.layers)] + [head]
    if mode == "drop":
        return [3 * flops for flops in dropped]
    share = 1 / config.interval if config.align_schedule == "spread" else 1
    if config.shared_prefix:
        full[: plan.cross] = [0] * plan.cross
    if config.objective == "released":
        full[-1] = 0
    return [3 * (a + share * b) for a, b in zip(dropped, full, strict=True)]


def flops_saved(shape: Shape, config: ScTDConfig) -> float:
    """Fraction of the dense step's operations that the method saves on average."""
    cost: dict[str, float] = {mode: sequence_flops(shape, config, mode) for mode in modes(config)}
    return 1 - mean_cost(config, cost) / cost["dense"]
