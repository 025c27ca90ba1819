"""How good the model is, and how far the dropped pass has drifted from the full one (the paper's semantic loss)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sctd_kernels
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sctd_ds.method import passes
from sctd_ds.method.convert import state_of
from sctd_ds.method.objective import token_losses
from sctd_ds.method.passes import Streams
from sctd_ds.method.state import ScTD

COMMON_RATE = 0.15
"""The mask rate, BERT's, at which every run is judged: a token is harder to predict where more of its row is masked, so losses
at different rates do not compare."""


def judge(engine: Any, batches: Callable[[float], Iterable[Mapping[str, Tensor]]], rate: float) -> dict[str, float]:
    """`validate` at the run's own mask rate, and where that is another one than COMMON_RATE, "loss_15": "loss_full" at that.

    batches: by mask rate, see `validate`.
    """
    values = validate(engine, batches(rate))
    if rate != COMMON_RATE:
        values["loss_15"] = validate(engine, batches(COMMON_RATE))["loss_full"]
    return values


@torch.no_grad()
def validate(engine_or_model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Compare the full and the dropped pass without dropout, over all ranks. The model stays in training or evaluation.

    batches: this rank's micro-batches on any device; all ranks call, and all stages of a pipeline pass the same ones.
    Returns the validation metrics: "loss_full" (masked-LM loss of the exported model, in nats per labelled token) and, when
    the method drops tokens, "loss_drop", "gap" (their difference), and for the [CLS] state at layers l and l-1 the mean KL
    ("kl_last", "kl_previous") and cosine ("cosine_last", "cosine_previous") between the passes.
    """
    model = getattr(engine_or_model, "module", engine_or_model)
    state = state_of(model)
    device = next(model.parameters()).device
    names = ["labels", "rows", "loss_full"]
    if state.plan.drops:
        names += ["loss_drop", "kl_last", "kl_previous", "cosine_last", "cosine_previous"]
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def visit(streams: Streams) -> None:
        for name, value in _measure(state, streams).items():
            sums[name] += value.double()

    # The random policy draws numbers, which must not change the random state of training.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if hasattr(engine_or_model, "evaluate"):  # a pipeline, whose stages work together
            engine_or_model.evaluate(batches, visit)
        else:
            training = model.training
            model.eval()
            for raw in batches:
                batch = state.read((), {key: value.to(device) for key, value in raw.items()})
                visit(passes.run(state, batch, state.both_passes))
            model.train(training)
    return _means(sums)


def _measure(state: ScTD, streams: Streams) -> dict[str, Tensor]:
    """Sums over one micro-batch: losses over labelled tokens, the others over rows; each a tensor of one number."""
    labelled, full, dropped = streams.labelled, streams.full_pass, streams.dropped_pass
    assert labelled is not None and full is not None
    sums = {
        "labels": labelled.count,
        "rows": torch.full_like(labelled.count, len(streams.batch.input_ids)),
        "loss_full": token_losses(state, full, labelled).sum(),
    }
    if dropped is None:
        return sums
    sums["loss_drop"] = token_losses(state, dropped, labelled).sum()
    norm = state.adapter.final_norm
    for name in ("last", "previous"):
        teacher, student = norm(getattr(full, name)[:, 0]), norm(getattr(dropped, name)[:, 0])
        sums[f"kl_{name}"] = sctd_kernels.softmax_kl(teacher, student).sum()
        sums[f"cosine_{name}"] = F.cosine_similarity(teacher.float(), student.float()).sum()
    return sums


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums of all ranks divided by their counts. Every rank passes the same names, even one without a batch."""
    total = torch.stack(list(sums.values()))
    if dist.is_initialized():
        dist.all_reduce(total)
    value = dict(zip(sums, total.tolist(), strict=True))
    labels, rows = max(value.pop("labels"), 1.0), max(value.pop("rows"), 1.0)
    means = {name: x / (labels if name.startswith("loss") else rows) for name, x in value.items()}
    if "loss_drop" in means:
        means["gap"] = means["loss_drop"] - means["loss_full"]
    return means
