"""Export of an engine or model to a plain Hugging Face folder, with the importance table in a file of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sctd_ds.method.convert import is_converted, state_of

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Files of a Hugging Face folder that hold weights, one or shards; safetensors or torch's pickles."""
IMPORTANCE = "importance.safetensors"
"""A file of an exported folder: tensor "scores", [V] fp32, and as metadata the drop ratio, the importance policy, and a SHA-256
of these."""


@dataclass(frozen=True)
class ImportanceTable:
    """A run's learned scores [V] fp32, the importance policy that learned them, and the share of dropped tokens."""

    scores: Tensor
    drop_ratio: float
    policy: str


def export(engine_or_model: Any, folder: str | Path, tokenizer: Any = None, card: str | None = None) -> Path:
    """Write a folder that AutoModelForMaskedLM.from_pretrained loads: fp32 weights, config, and tokenizer and card if given.

    A learned importance table is written as well, see `read_importance`. With an engine, every rank must call this, because
    ZeRO shards the fp32 weights; rank 0 writes. The folder appears complete or not at all, and replaces an existing one.
    """
    folder = Path(folder)
    model = _plain(engine_or_model)
    weights = full_precision_state(engine_or_model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        # A fresh module of the plain class has no ScTD state, and a config with the dtype of the weights.
        with torch.random.fork_rng(devices=[]):
            plain = type(model)(model.config)
        plain.load_state_dict(weights)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            plain.save_pretrained(partial)
            write_importance(engine_or_model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
                forget_where_from(partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
    return folder


def write_importance(engine_or_model: Any, folder: Path) -> None:
    """Write the learned table of a converted model, if it has one, as a file of the model's folder; see `read_importance`."""
    if not is_converted(engine_or_model):
        return
    state = state_of(engine_or_model)
    if state.has_table:
        scores = state.importance.state_dict()["scores"].contiguous()
        table = ImportanceTable(scores, state.config.drop_ratio, state.importance.name)
        about = {"drop_ratio": str(table.drop_ratio), "importance": table.policy, "sha256": _digest(table)}
        save_file({"scores": scores}, folder / IMPORTANCE, metadata=about)


def read_importance(folder: str | Path) -> ImportanceTable | None:
    """The table of an exported folder; None for a model without one: dense, with random dropping, or from another tool.

    Raises ValueError for a file that is damaged or is no importance table.
    """
    file = Path(folder) / IMPORTANCE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            about = content.metadata() or {}
            table = ImportanceTable(content.get_tensor("scores"), float(about["drop_ratio"]), about["importance"])
        if about.get("sha256", _digest(table)) != _digest(table):  # earlier versions wrote none
            raise ValueError("its SHA-256 is not the one that was written")
        return table
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not an importance table, or damaged ({error}); export the model again") from None


def forget_where_from(folder: Path) -> None:
    """Take out of a saved tokenizer's settings how transformers found it here, which is wrong elsewhere."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    if kept != settings:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def full_precision_state(engine_or_model: Any) -> dict[str, torch.Tensor]:
    """The state_dict in fp32 on the CPU, from the optimizer's master weights if there are any. Collective on an engine.

    For a pipeline it is complete on rank 0; other ranks may get only the weights of their stage.
    """
    model = _plain(engine_or_model)
    # The ranks of a pipeline have released the weights of other stages.
    state = {name: value.detach() for name, value in model.state_dict().items() if not value.is_meta}
    if hasattr(engine_or_model, "module"):
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in model.named_parameters(remove_duplicate=False):
            if hasattr(parameter, "_hp_mapping"):
                state[name] = safe_get_full_fp32_param(parameter)
    state = {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in state.items()}
    gather = getattr(engine_or_model, "gather_state", None)
    return gather(state) if gather else state


def _digest(table: ImportanceTable) -> str:
    """The SHA-256 of all that a table says."""
    about = f"{table.drop_ratio} {table.policy} {table.scores.dtype} {list(table.scores.shape)} "
    return hashlib.sha256(about.encode() + table.scores.view(torch.uint8).numpy().tobytes()).hexdigest()


def _plain(engine_or_model: Any) -> Any:
    """The Hugging Face model itself, out of an engine or a pipeline."""
    model: nn.Module = getattr(engine_or_model, "module", engine_or_model)
    return getattr(model, "plain_model", model)
