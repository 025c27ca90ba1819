"""How good the model is, and how far the dropped pass has drifted from the full one: the paper's semantic loss, live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sctd_kernels
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sctd_ds.encoder import state_of
from sctd_ds.objective import locate_labels, token_losses


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

    def add(**values: Tensor) -> None:
        for name, value in values.items():
            sums[name] += value.double()

    training = model.training
    model.eval()
    with torch.random.fork_rng(enabled=True):  # the random policy draws; training must not notice
        for raw in batches:
            batch = state.adapter.batch((), {key: value.to(device) for key, value in raw.items()})
            adapter = state.adapter
            labelled = locate_labels(batch.labels, adapter.ignore_index, state.config.labels_per_row, adapter.vocabulary)
            prefix = state.encoder.prefix(batch)
            full = state.encoder.full_suffix(prefix, batch.attention_mask)
            sums["rows"] += len(batch.input_ids)
            add(loss_full=token_losses(state, full, labelled).sum(), labels=labelled.count)
            if state.encoder.plan is None:
                continue
            dropped = state.encoder.dropped_suffix(prefix, batch.attention_mask, state.select(batch))
            add(loss_drop=token_losses(state, dropped, labelled).sum())
            for name, teacher, student in (
                ("last", full.last[:, 0], dropped.last[:, 0]),
                ("previous", full.previous[:, 0], dropped.previous[:, 0]),
            ):
                teacher, student = adapter.final_norm(teacher), adapter.final_norm(student)
                add(**{
                    f"kl_{name}": sctd_kernels.softmax_kl(teacher, student).sum(),
                    f"cosine_{name}": F.cosine_similarity(teacher.float(), student.float()).sum(),
                })  # fmt: skip
    model.train(training)
    return _means(sums)


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
