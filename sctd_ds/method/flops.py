"""How many floating-point operations a step takes, by the layer plan that the training step follows."""

from __future__ import annotations

from dataclasses import dataclass

from sctd_ds.config import ScTDConfig
from sctd_ds.method.plan import LayerPlan, Region, kept_tokens
from sctd_ds.method.schedule import Mode, mean_cost, modes


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the cost of a step: the encoder's, the row's, and the labelled tokens of a row."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    length: int
    labels: int


def sequence_flops(shape: Shape, config: ScTDConfig, mode: Mode, head_rows: int | None = None) -> float:
    """Floating-point operations of one sequence, forward and backward; see `part_flops`."""
    return sum(part_flops(shape, config, mode, head_rows))


def part_flops(shape: Shape, config: ScTDConfig, mode: Mode, head_rows: int | None = None) -> list[float]:
    """Operations of one sequence in each encoder layer and, last, in the head: forward, and twice as many backward.

    A product of [m, k] and [k, n] counts 2mkn; attention counts 4 * queries * keys * hidden; normalisation, activation and
    softmax count nothing. head_rows: rows that the output head of a plain model runs on, whose last layer runs everywhere
    (default: the labelled rows, and the last layer as `config` says). With the "spread" schedule an "align" sequence is the
    average over one row that aligns and interval - 1 rows that do not.
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

    def layer(region: Region) -> float:
        queries, keys = queries_and_keys[region]
        return 4 * queries * d * d + 4 * keys * d * d + 4 * queries * d * f + 4 * queries * keys * d

    full = [layer("last" if i == plan.last else "full") for i in range(shape.layers)] + [head]
    if mode == "dense":
        return [3 * flops for flops in full]
    dropped = [layer(plan.region(i)) for i in range(shape.layers)] + [head]
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
