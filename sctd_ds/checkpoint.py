"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong run.

    RUN/checkpoints/step_00001000/     DeepSpeed's files, the random states, settings.json, manifest.json
    RUN/checkpoints/latest             name of the newest complete one (DeepSpeed's own tools read it)

A checkpoint is written under a name that nobody reads, listed file by file with size and SHA-256 in manifest.json, synced to
disk, and only then renamed. So a folder with a final name is complete; what it says is verified before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sctd_ds import config as configuration

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})$")
_PARTIAL = "partial-"
_MANIFEST = "manifest.json"
_SETTINGS = "settings.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or continued with these settings."""


def save(engine: Any, folder: Path, settings: Mapping[str, Any], position: int, keep_last: int) -> Path:
    """Write a checkpoint of the engine after its last step; every rank calls. Returns its folder.

    settings: the flat configuration, compared on resume. position: samples consumed by the loader. Older checkpoints beyond
    `keep_last` are deleted after the new one is complete.
    """
    final = folder / f"step_{engine.applied_steps:08d}"
    partial = folder / (_PARTIAL + final.name)
    if final.exists():
        return final
    first = dist.get_rank() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, client_state={"position": position})
        if first:
            content = {"settings": settings, "world_size": dist.get_world_size(), "step": engine.applied_steps}
            (partial / _SETTINGS).write_text(json.dumps(content, indent=1), encoding="utf-8")
            _write_manifest(partial)
            partial.rename(final)
            _sync(folder)
            _write_latest(folder, final.name)
            _prune(folder, keep_last)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}). Earlier checkpoints are intact: free space or fix the "
            "folder, and start the same command again"
        ) from error
    dist.barrier()
    return final


def find(folder: Path, resume: str) -> Path | None:
    """The newest complete and undamaged checkpoint, or None to start anew. Rank 0 looks, all ranks get its answer.

    resume: "auto" takes what there is, "must" raises CheckpointError when there is none, "never" raises it when there is
    one (so that nothing is overwritten). Damaged checkpoints are named and passed over; when all are damaged, that is an
    error, because starting anew would hide it.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = _find(folder, resume)
        except CheckpointError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise CheckpointError(answer[1])
    return answer[0]


def load(engine: Any, checkpoint: Path, settings: Mapping[str, Any], allow_change: tuple[str, ...] = ()) -> int:
    """Restore the engine from `checkpoint`; returns the loader's position. Other settings or ranks raise CheckpointError."""
    stored = json.loads((checkpoint / _SETTINGS).read_text(encoding="utf-8"))
    if stored["world_size"] != dist.get_world_size():
        raise CheckpointError(
            f"{checkpoint} was written by {stored['world_size']} ranks, this run has {dist.get_world_size()}: ZeRO keeps one "
            "share of the optimizer per rank. Start with the same number of ranks, or with --resume never and another output"
        )
    changed = configuration.differences(stored["settings"], json.loads(json.dumps(settings)), allow_change)
    if changed:
        raise CheckpointError(
            f"{checkpoint} was trained with other settings:\n  "
            + "\n  ".join(changed)
            + "\nUse the same settings, choose another --output, or allow a change with --allow-change KEY"
        )
    try:
        path, client = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except (RuntimeError, KeyError, EOFError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded ({error})") from error
    if path is None:
        raise CheckpointError(f"{checkpoint} cannot be loaded: DeepSpeed found no model file in it")
    return client["position"]


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        return f"{checkpoint / _MANIFEST} cannot be read ({error})"
    for name, (size, digest) in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, {size} were written (truncated?)"
        if _digest(file) != digest:
            return f"{file} is damaged: its SHA-256 is not the one that was written"
    return None


def _find(folder: Path, resume: str) -> Path | None:
    for partial in folder.glob(_PARTIAL + "*"):  # left by a run that was killed while it wrote
        shutil.rmtree(partial, ignore_errors=True)
    candidates = sorted((p for p in folder.glob("step_*") if _NAME.match(p.name)), reverse=True)
    if resume == "never":
        if candidates:
            raise CheckpointError(f"{folder} holds checkpoints, and --resume is never: choose another --output or delete it")
        return None
    for candidate in candidates:
        problem = verify(candidate)
        if problem is None:
            return candidate
        logger.warning("passing over %s: %s", candidate.name, problem)
    if candidates:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: restore one, or start anew in another --output")
    if resume == "must":
        raise CheckpointError(f"{folder} holds no checkpoint, and --resume is must")
    return None


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        _sync(file)
    manifest = {str(p.relative_to(folder)): [p.stat().st_size, _digest(p)] for p in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / _MANIFEST)
    _sync(folder)


def _write_latest(folder: Path, name: str) -> None:
    partial = folder / (_PARTIAL + "latest")
    partial.write_text(name, encoding="utf-8")
    _sync(partial)
    partial.replace(folder / "latest")


def _prune(folder: Path, keep_last: int) -> None:
    complete = sorted(p for p in folder.glob("step_*") if _NAME.match(p.name))
    for old in complete[:-keep_last]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            logger.warning("%s could not be deleted (%s)", old, error)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
