"""Outcomes on disk, one JSON file each, so that what was measured is never measured again and never mixed up."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import Tensor

from sctd_ds.eval.sources import EvalError
from sctd_ds.integrations.export import ImportanceTable, read_importance
from sctd_ds.method.selection import POLICIES
from sctd_ds.run.environment import device_name, versions

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # whole, in shards, or as torch pickles them


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder (or Hub name) under the name that reports give it.

    run: the folder of the run that exported it, where that is known. checkpoint: one of that run's; then the weights and the
    importance table are the checkpoint's.
    """

    name: str
    path: str
    run: Path | None = None
    checkpoint: Path | None = None

    def check(self) -> Model:
        """Self, or EvalError for what is neither the folder of a model with its tokenizer nor a Hub name within reach."""
        folder = Path(self.path)
        if folder.is_dir():
            missing = [f for f in ("config.json", "tokenizer_config.json") if not (folder / f).is_file()]
            if not any(True for kind in WEIGHTS for _ in folder.glob(kind)):
                missing.append("weights (model.safetensors)")
            if missing:
                running = "; the run is not finished" if (folder / "checkpoints").is_dir() else ""
                expected = "expected a Hugging Face folder, or a run's, which has one in model/"
                raise EvalError(f"{folder}: no {' and no '.join(missing)}; {expected}{running}")
        elif folder.exists() or ("/" in self.path and folder.parent.is_dir()):  # meant as a path: nobody asks the Hub for it
            raise EvalError(f"{folder}: no such folder; expected a Hugging Face folder, a run's, or a Hub name")
        try:
            if folder.is_dir():
                transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            elif not isinstance(huggingface_hub.try_to_load_from_cache(self.path, "config.json"), str):
                huggingface_hub.model_info(self.path)  # asks once, where from_pretrained tries for half a minute
        except Exception as error:  # OSError, ValueError, the HTTP client's own ...: all say what is wrong
            what = "no model that can be loaded" if folder.is_dir() else "no such folder, nor a Hub name that can be reached"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EvalError(f"{self.path}: {what} ({reason})") from None
        return self

    @property
    def step(self) -> int | None:
        """The optimizer step of the checkpoint."""
        return int(self.checkpoint.name.removeprefix("step_")) if self.checkpoint else None

    def history(self) -> list[Model]:
        """This model at the checkpoints that its run kept, by step. A pipeline's are left out: their weights lie apart."""
        kept = sorted((self.run / "checkpoints").glob("step_*")) if self.run else ()
        models = [replace(self, checkpoint=folder) for folder in kept]
        return [model for model in models if model._settings()["pretrain.stages"] == 1]

    def read_importance(self) -> ImportanceTable | None:
        """The table in the folder, if there is one. Raises EvalError for one that cannot be read."""
        try:
            return read_importance(self.path)
        except ValueError as error:
            raise EvalError(str(error)) from None

    def _settings(self) -> dict[str, Any]:
        assert self.checkpoint is not None
        return json.loads((self.checkpoint / "settings.json").read_text(encoding="utf-8"))["settings"]

    def read_checkpoint(self) -> tuple[dict[str, Tensor], ImportanceTable | None]:
        """Weights of the checkpoint as its run computed with them (16 bits in a 16-bit run), and the table if there is one.

        Raises EvalError for a checkpoint that is damaged.
        """
        from sctd_ds.engine import checkpoint  # brings DeepSpeed along

        assert self.checkpoint is not None
        problem = checkpoint.verify(self.checkpoint)
        if problem:
            raise EvalError(f"{problem}; delete the checkpoint to leave it out")
        settings = self._settings()
        content = torch.load(self.checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
        if settings["sctd.method"] == "dense" or not POLICIES[settings["sctd.importance"]].has_table:
            return content["module"], None
        scores = content["sctd"]["importance"]["scores"]
        return content["module"], ImportanceTable(scores, settings["sctd.drop_ratio"], settings["sctd.importance"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the weights and the table of a folder or checkpoint; the name itself for a model of the Hub."""
        if self.checkpoint:
            return fingerprint(self.checkpoint / "manifest.json")
        weights = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(self.path).glob(kind))
        return fingerprint(*weights) if weights else self.path


def fingerprint(*contents: Any) -> str:
    """16 hex digits that change with any of the contents: a file's (given its Path), or what JSON can say."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, Path):
            with content.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        else:
            digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def remember(path: Path | None, settings: dict[str, Any], measure: Callable[[], Any], **about: Any) -> Any:
    """The outcome of `measure`, read from `path` where it was measured before with the same settings.

    about: recorded beside it. Without a path nothing is kept. Raises EvalError when the file holds other settings.
    """
    if path is None:
        return measure()
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in settings if found["settings"].get(key) != settings[key]]
        if changed:
            raise EvalError(f"{path}: measured with another {', '.join(changed)}; choose another --out, or delete the file")
        return found["scores"]

    start = time.perf_counter()
    outcome = measure()
    record = {
        **about,
        "settings": settings,
        "scores": outcome,
        "seconds": round(time.perf_counter() - start, 2),
        "device": device_name(),
        **versions("torch", "transformers"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(path)
    return json.loads(json.dumps(outcome))
