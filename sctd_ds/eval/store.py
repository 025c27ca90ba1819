"""The models under evaluation, and their outcomes on disk: one JSON file each, so that nothing is measured twice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from torch import Tensor

from sctd_ds.eval.sources import EvalError
from sctd_ds.integrations.export import WEIGHTS, ImportanceTable, read_importance
from sctd_ds.method.selection import POLICIES
from sctd_ds.run.environment import device_name, versions


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder (or Hub name), and its name in reports.

    run: the folder of the run that exported it, if known. checkpoint: one of that run's; if set, the weights and the
    importance table come from it.
    """

    name: str
    path: str
    run: Path | None = None
    checkpoint: Path | None = None

    def check(self) -> Model:
        """The model itself. Raises EvalError unless it is a folder with model and tokenizer, or a reachable Hub name."""
        folder = Path(self.path)
        if folder.is_dir():
            missing = [f for f in ("config.json", "tokenizer_config.json") if not (folder / f).is_file()]
            if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
                missing.append("weights (model.safetensors)")
            if missing:
                running = "; the run is not finished" if (folder / "checkpoints").is_dir() else ""
                expected = "expected a Hugging Face folder, or a run's folder, which has one in model/"
                raise EvalError(f"{folder}: no {' and no '.join(missing)}; {expected}{running}")
        elif folder.exists() or ("/" in self.path and folder.parent.is_dir()):  # a path, so do not try the Hub
            raise EvalError(f"{folder}: no such folder; expected a Hugging Face folder, a run's folder, or a Hub name")
        try:
            if folder.is_dir():
                transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            elif not isinstance(huggingface_hub.try_to_load_from_cache(self.path, "config.json"), str):
                huggingface_hub.model_info(self.path)  # one request, while from_pretrained retries for half a minute
        except Exception as error:  # OSError, ValueError, the HTTP client's own ...: each message names the problem
            what = "no model that can be loaded" if folder.is_dir() else "no such folder, nor a reachable Hub name"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EvalError(f"{self.path}: {what} ({reason})") from None
        return self

    @property
    def step(self) -> int | None:
        """The optimizer step of the checkpoint."""
        if self.checkpoint is None:
            return None
        from sctd_ds.engine import checkpoint  # imports DeepSpeed, here and below

        return checkpoint.about(self.checkpoint)["step"]

    def history(self) -> list[Model]:
        """This model at the checkpoints that its run kept, by step; without those of a pipeline, whose weights are split."""
        if self.run is None:
            return []
        from sctd_ds.engine import checkpoint

        folders = checkpoint.kept(self.run / "checkpoints")
        with _errors_of_checkpoints():
            whole = [folder for folder in folders if checkpoint.about(folder)["settings"]["pretrain.stages"] == 1]
        return [replace(self, checkpoint=folder) for folder in whole]

    def read_importance(self) -> ImportanceTable | None:
        """The table in the folder, if there is one. Raises EvalError for one that cannot be read."""
        try:
            return read_importance(self.path)
        except ValueError as error:
            raise EvalError(str(error)) from None

    def read_checkpoint(self) -> tuple[dict[str, Tensor], ImportanceTable | None]:
        """The checkpoint's weights in the dtype of its run's computations, and the importance table if there is one.

        Raises EvalError for a damaged checkpoint.
        """
        from sctd_ds.engine import checkpoint

        assert self.checkpoint is not None
        with _errors_of_checkpoints():
            problem = checkpoint.verify(self.checkpoint)
            if problem:
                raise checkpoint.CheckpointError(problem)
            settings = checkpoint.about(self.checkpoint)["settings"]
            weights, scores = checkpoint.read_model(self.checkpoint)
        if settings["sctd.method"] == "dense" or not POLICIES[settings["sctd.importance"]].has_table:
            return weights, None
        return weights, ImportanceTable(scores, settings["sctd.drop_ratio"], settings["sctd.importance"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the weights and the table of a folder or checkpoint; for a model of the Hub, its name."""
        if self.checkpoint:
            from sctd_ds.engine import checkpoint

            return fingerprint(checkpoint.manifest(self.checkpoint))
        weights = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(self.path).glob(kind))
        return fingerprint(*weights) if weights else self.path


@contextlib.contextmanager
def _errors_of_checkpoints() -> Iterator[None]:
    """EvalError in place of a checkpoint's errors."""
    from sctd_ds.engine.reader import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise EvalError(f"{error}; delete the checkpoint to leave it out") from None


def fingerprint(*contents: Any) -> str:
    """16 hex digits that change with any of the contents: the bytes of a file (given as a Path), or a JSON value."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, Path):
            with content.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        else:
            digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def read_outcome(path: Path) -> dict[str, Any]:
    """What `remember` wrote into a file. Raises EvalError for one that is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvalError(f"{path}: cannot be read ({error}); delete the file to measure again") from None
    if not isinstance(record, dict) or not {"model", "task", "settings", "scores"} <= record.keys():
        raise EvalError(f"{path}: not an outcome, or damaged; delete the file to measure again")
    return record


def remember(path: Path | None, settings: dict[str, Any], measure: Callable[[], Any], **about: Any) -> Any:
    """The outcome of `measure`, or of an earlier call with the same settings, which `path` keeps.

    about: recorded beside the outcome. Without a path nothing is stored. Raises EvalError if the file has other settings.
    """
    if path is None:
        return measure()
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        found = read_outcome(path)
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
