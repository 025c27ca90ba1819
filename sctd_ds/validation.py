"""How good the model is, and how far the dropped pass has drifted from the full one: the paper's semantic loss, live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sctd_kernels
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sctd_ds.adapters import Batch
from sctd_ds.encoder import Passes, ScTD, state_of
from sctd_ds.objective import token_losses


@torch.no_grad()
def validate(engine_or_model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Compare the full and the dropped pass without dropout, over all ranks. The model comes back in its former mode.

    Returns "loss_full" (masked-LM loss of the exported model) and, when the method drops tokens, "loss_drop", "gap" (their
    difference), and for the [CLS] state at layers l and l-1 the mean KL ("kl_last", "kl_previous") and cosine
    ("cosine_last", "cosine_previous") between the passes.
    """
    model = getattr(engine_or_model, "module", engine_or_model)
    state = state_of(model)
    device = next(model.parameters()).device
    names = ["labels", "rows", "loss_full"]
    if state.encoder.plan is not None:
        names += ["loss_drop", "kl_last", "kl_previous", "cosine_last", "cosine_previous"]
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def visit(batch: Batch, passes: Passes) -> None:
        for name, value in _measure(state, batch, passes).items():
            sums[name] += value.double()

    # The random policy draws numbers; training must not notice.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if hasattr(engine_or_model, "evaluate"):  # a pipeline's stages work together
            engine_or_model.evaluate(batches, visit)
        else:
            training = model.training
            model.eval()
            for raw in batches:
                batch = state.adapter.batch((), {key: value.to(device) for key, value in raw.items()})
                visit(batch, both_passes(state, batch))
            model.train(training)
    return _means(sums)


def both_passes(state: ScTD, batch: Batch) -> Passes:
    """The full pass of all rows, and the dropped one where the method has it; what they share is run once."""
    rows, labelled, mask = range(len(batch.input_ids)), state.locate(batch, "dense"), batch.attention_mask
    prefix, selection, dropped = state.encoder.prefix(batch), None, None
    full = state.encoder.full_suffix(prefix, mask, labelled.outputs)
    if state.encoder.plan is not None:
        selection = state.select(batch)
        dropped = state.encoder.dropped_suffix(prefix, mask, selection, labelled.outputs)
    return Passes(labelled, dropped, full, selection, rows)


def _measure(state: ScTD, batch: Batch, passes: Passes) -> dict[str, Tensor]:
    """Sums over one micro-batch."""
    adapter, labelled, full, dropped = state.adapter, passes.labelled, passes.full, passes.dropped
    assert full is not None
    sums = {
        "labels": labelled.count,
        "rows": torch.full_like(labelled.count, len(batch.input_ids)),
        "loss_full": token_losses(state, full, labelled).sum(),
    }
    if dropped is None:
        return sums
    sums["loss_drop"] = token_losses(state, dropped, labelled).sum()
    for name, teacher, student in (
        ("last", full.last[:, 0], dropped.last[:, 0]),
        ("previous", full.previous[:, 0], dropped.previous[:, 0]),
    ):
        teacher, student = adapter.final_norm(teacher), adapter.final_norm(student)
        sums[f"kl_{name}"] = sctd_kernels.softmax_kl(teacher, student).sum()
        sums[f"cosine_{name}"] = F.cosine_similarity(teacher.float(), student.float()).sum()
    return sums


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums of all ranks divided by their counts. Every rank has the same names, also one without a batch."""
    total = torch.stack(list(sums.values()))
    if dist.is_initialized():
        dist.all_reduce(total)
    value = dict(zip(sums, total.tolist(), strict=True))
    labels, rows = max(value.pop("labels"), 1.0), max(value.pop("rows"), 1.0)
    means = {name: x / (labels if name.startswith("loss") else rows) for name, x in value.items()}
    if "loss_drop" in means:
        means["gap"] = means["loss_drop"] - means["loss_full"]
    return means
