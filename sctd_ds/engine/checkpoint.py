"""Checkpoints, written so that a kill, a full disk or a flipped bit cannot lead to a wrong run.

    RUN/checkpoints/step_00001000/     DeepSpeed's files, the random states, settings.json, manifest.json
    RUN/checkpoints/latest             name of the newest complete one (DeepSpeed's own tools read it)

A checkpoint is written under a partial name, its files are listed in manifest.json with size and SHA-256 and synced to disk,
and only then is the folder renamed. So a folder with its final name is complete. Its files are verified before they are loaded,
no file that is not listed is, and none can run code (`reader`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor

from sctd_ds.config import FIXED_KEYS, MAY_DIFFER_ON_RESUME, MAY_DIFFER_ON_START, counted, differences
from sctd_ds.engine import ranks, reader
from sctd_ds.engine.random_state import file_of
from sctd_ds.engine.reader import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})$")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_(mp_rank_\d+)_optim_states\.pt$")
_PARTIAL = "partial-"
_MANIFEST = "manifest.json"
_SETTINGS = "settings.json"


def save(engine: Any, folder: Path, settings: Mapping[str, Any], position: int, keep_last: int) -> Path:
    """Write a checkpoint of the engine after its last step; every rank calls. Returns its folder.

    settings: the flat configuration, compared on resume. position: samples consumed by the loader. Once the new checkpoint
    is complete, all but the newest `keep_last` are deleted.
    """
    final = folder / f"step_{engine.applied_steps:08d}"
    partial = folder / (_PARTIAL + final.name)
    if ranks.on_first(lambda: _is_saved(final)):
        return final
    first = dist.get_rank() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, client_state={"position": position})
        world = dist.get_world_size()
        shards = world if engine.save_zero_checkpoint else 0
        content = {"settings": settings, "world_size": world, "step": engine.applied_steps}
        ranks.on_first(lambda: _complete(partial, final, content, shards, keep_last))
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        problem = CheckpointError(
            f"{final}: the checkpoint could not be written ({error}). Earlier checkpoints are intact: free space or fix the "
            "folder, and start the same command again"
        )
        problem.shared = getattr(error, "shared", False)
        raise problem from error
    return final


def _complete(partial: Path, final: Path, content: Mapping[str, Any], shards: int, keep_last: int) -> None:
    """Give a checkpoint its final name, once the files of every rank are known to be in it.

    content: that of settings.json. shards: how many files of the optimizer there must be.
    """
    found = sum(_SHARD.search(file.name) is not None for file in partial.iterdir())
    missing = [rank for rank in range(content["world_size"]) if not file_of(partial, rank).is_file()]
    if missing or found != shards:
        lost = f", and no file of the ranks {missing}" if missing else ""
        raise FileNotFoundError(f"it has {found} of {shards} shards of the optimizer{lost}: do all nodes share this folder?")
    content = {**content, "files": sorted(_names(partial))}
    (partial / _SETTINGS).write_text(json.dumps(content, indent=1), encoding="utf-8")
    _write_manifest(partial)
    partial.rename(final)
    _sync(final.parent)
    _write_latest(final.parent, final.name)
    _prune(final.parent, keep_last)


def _is_saved(final: Path) -> bool:
    """Whether a checkpoint is there and undamaged; a damaged one is deleted, for the same step to be saved again."""
    if not final.exists():
        return False
    problem = verify(final)
    if problem is not None:
        logger.warning("replacing %s: %s", final.name, problem)
        shutil.rmtree(final)
    return problem is None


def find(folder: Path, resume: str, tidy: bool = True) -> Path | None:
    """The newest complete and undamaged checkpoint, or None to start anew. Rank 0 looks, all ranks get its answer.

    resume: "auto" takes the newest, if any; "must" raises CheckpointError when there is none; "never" raises it when there is
    one, so that nothing is overwritten. Damaged checkpoints are skipped with a warning. When all are damaged, that is an
    error, because starting anew would hide it. tidy: delete what a killed run left half written.
    """
    name = ranks.on_first(lambda: _find(folder, resume, tidy))
    return folder / name if name else None


def check(
    checkpoint: Path,
    settings: Mapping[str, Any],
    allow_change: tuple[str, ...] = (),
    *,
    steps: int,
    from_steps: Set[str] = frozenset(),
    other_layout: bool = False,
) -> None:
    """CheckpointError unless a run of `settings` and `steps` can continue from `checkpoint`; it only reads.

    settings: the flat configuration. allow_change: keys that may differ beside those that always may. from_steps: keys whose
    values follow from pretrain.steps, and change with it. other_layout: the run is to `start` from it: ranks and stages may
    differ, at least one step must be left, and the files are verified here.
    """
    if other_layout:
        problem = verify(checkpoint)
        if problem:
            raise CheckpointError(problem)
    stored = about(checkpoint)
    if not other_layout and stored["world_size"] != dist.get_world_size():
        raise CheckpointError(
            f"{checkpoint} was written by {counted(stored['world_size'], 'rank', 'ranks')}, this run has "
            f"{dist.get_world_size()}: ZeRO keeps one "
            "share of the optimizer per rank. Start with the same number of ranks, or use another --output and --start-from"
        )
    may_differ = (MAY_DIFFER_ON_START if other_layout else MAY_DIFFER_ON_RESUME) | (set(allow_change) - FIXED_KEYS)
    if stored["settings"].get("pretrain.steps") != steps:
        may_differ |= from_steps
    as_stored = json.loads(json.dumps(settings))
    changed = differences(stored["settings"], as_stored, may_differ)
    if changed:
        raise CheckpointError(
            f"{checkpoint} was trained with other settings:\n  "
            + "\n  ".join(changed)
            + "\nUse the same settings, choose another --output, or allow a change with --allow-change KEY"
        )
    if steps - stored["step"] < (1 if other_layout else 0):
        raise CheckpointError(
            f"{checkpoint} is at step {stored['step']}, and the run ends at step {steps}: raise pretrain.steps to continue"
        )


def load(engine: Any, checkpoint: Path) -> int:
    """Restore the engine from a `checkpoint` that passed `check`; returns the loader's position."""
    if engine.load_universal_checkpoint():
        raise CheckpointError("checkpoint.load_universal: a run does not read universal checkpoints; remove the key")
    try:
        path, client = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except CheckpointError:
        raise
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded ({error})") from error
    if path is None:
        raise CheckpointError(f"{checkpoint} cannot be loaded: DeepSpeed found no model file in it")
    _follow(engine.lr_scheduler)
    return client["position"]


def start(engine: Any, checkpoint: Path) -> int:
    """Continue from a checkpoint of another layout: other pipeline stages, ranks, ZeRO stage or split of the batch.

    Weights, optimizer, learning rate, importance table, step and data position are those of the checkpoint, which passed
    `check`; dropout draws new random numbers. Returns the loader's position.
    """
    try:
        position = restore(engine, checkpoint)
    except CheckpointError:
        raise
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded ({error})") from error
    _follow(engine.lr_scheduler)
    return position


def _follow(schedule: Any) -> None:
    """Set the next step's rates as this run's schedule has them; the optimizer that was loaded has those of the run before.

    schedule: of DeepSpeed or `integrations.schedules`; torch's cannot be asked.
    """
    if hasattr(schedule, "last_batch_iteration"):
        schedule.step(schedule.last_batch_iteration)


def restore(engine: Any, folder: Path) -> int:
    """Load a checkpoint that any layout saved (ZeRO 1 or 2) into an engine of any layout; returns its "position", or 0."""
    models = sorted(folder.glob("mp_rank_*_model_states.pt"))
    weights, moments, groups, scalars = {}, {}, [], []
    for model in models:
        client = reader.read(model)
        pieces = _by_parameter(folder, model.name.removesuffix("_model_states.pt"), client["sctd"]["names"])
        weights.update(pieces[0])
        moments.update(pieces[1])
        groups, scalars = pieces[2], pieces[3]
    if not weights:
        raise KeyError("no ZeRO 1 or 2 optimizer files in it")
    names, zero = engine.parameter_names(), engine.optimizer
    for name, parameter in engine.module.named_parameters():
        value = weights[names[name]].to(parameter.device)
        parameter.data.copy_(value.view_as(parameter))
        safe_set_full_fp32_param(parameter, value)
    base = zero.optimizer
    names_of = {parameter: names[name] for name, parameter in engine.module.named_parameters()}
    layout = zip(base.param_groups, zero.bit16_groups, groups, scalars, strict=True)
    for group, parameters, saved, shared in layout:
        group.update({key: value for key, value in saved.items() if key != "params"})
        (flat,) = group["params"]  # this rank's share of the group
        state = {key: torch.zeros_like(flat) for key in moments[names_of[parameters[0]]]}
        for parameter in parameters:
            fragment = parameter._hp_mapping  # None where another rank has it all
            for key in state if fragment else ():
                here, there = fragment.hp_fragment_address, fragment.lp_fragment_address
                value = moments[names_of[parameter]][key].narrow(0, there.start, there.numel)
                state[key].narrow(0, here.start, here.numel).copy_(value)
        base.state[flat] = {**state, **_placed(shared, group, flat.device)}
    if engine.lr_scheduler is not None and client["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(client["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = client["global_steps"], client["skipped_steps"]
    engine.global_samples = client["global_samples"]
    engine.sctd.importance.to(engine.device)
    engine.sctd.importance.load_state_dict(client["sctd"]["importance"])
    return client.get("position", 0)


def _placed(shared: Mapping[str, Any], group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of what a group's state holds once (the step count), on the device that its optimizer reads: fused ones read it
    on the accelerator, others on the CPU."""
    place = device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    return {key: value.to(place, copy=True) if isinstance(value, Tensor) else value for key, value in shared.items()}


Pieces = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[dict[str, Any]], list[dict[str, Any]]]


def _by_parameter(folder: Path, stage: str, names: Mapping[str, str]) -> Pieces:
    """A stage's ZeRO shards put together: flat fp32 weights and optimizer states by the model's names; and for each parameter
    group its options and the state that is not per parameter (the step count)."""
    shards = {int(match[1]): file for file in folder.iterdir() if (match := _SHARD.search(file.name)) and match[2] == stage}
    weights: dict[str, list[Tensor]] = {}
    moments: dict[str, dict[str, list[Tensor]]] = {}
    groups: list[dict[str, Any]] = []
    scalars: list[dict[str, Any]] = []
    # Each rank's shard is one flat tensor, with a list of the parameters' fragments in it. Fragments continue rank by rank.
    for rank in sorted(shards):
        saved = reader.read(shards[rank])["optimizer_state_dict"]
        base = saved["base_optimizer_state"]
        groups, scalars = base["param_groups"], []
        for i, (flat, fragments) in enumerate(
            zip(saved["single_partition_of_fp32_groups"], saved["param_slice_mappings"], strict=True)
        ):
            state = base["state"][i]
            whole = {key: value for key, value in state.items() if getattr(value, "numel", int)() == flat.numel()}
            scalars.append({key: value for key, value in state.items() if key not in whole})
            for name, fragment in fragments.items():
                place = slice(fragment.start, fragment.start + fragment.numel)
                weights.setdefault(names[name], []).append(flat[place])
                own = moments.setdefault(names[name], {})
                for key, value in whole.items():
                    own.setdefault(key, []).append(value[place])
    joined = {name: {key: torch.cat(parts) for key, parts in own.items()} for name, own in moments.items()}
    return {name: torch.cat(parts) for name, parts in weights.items()}, joined, groups, scalars


def kept(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, by step."""
    return sorted(path for path in folder.glob("step_*") if _NAME.match(path.name))


def about(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint records of its run: "settings" (the flat configuration), "world_size", "step", and "files", the names
    of the others (not in those of earlier versions). Raises CheckpointError."""
    content = _read_json(checkpoint / _SETTINGS)
    if not {"settings", "world_size", "step"} <= content.keys():
        raise CheckpointError(f"{checkpoint / _SETTINGS} is damaged: it lacks a part of what was written")
    return content


def manifest(checkpoint: Path) -> Path:
    """The file that lists the others with their hashes, and so differs between any two checkpoints."""
    return checkpoint / _MANIFEST


def read_model(checkpoint: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Weights by name, in the run's dtype, and importance scores [V] fp32, of a checkpoint without pipeline stages."""
    content = reader.read(checkpoint / "mp_rank_00_model_states.pt")
    return content["module"], content["sctd"]["importance"]["scores"]


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        if not (checkpoint / _MANIFEST).is_file():
            return f"{checkpoint} is not a checkpoint (it holds no {_MANIFEST}): give a folder RUN/checkpoints/step_..."
        listed = _read_json(checkpoint / _MANIFEST)
        _verify_names(checkpoint, listed.keys())
        for name, entry in listed.items():
            _verify_file(checkpoint / name, entry)
        lost = set(about(checkpoint).get("files", ())) - listed.keys()
        if lost:  # an entry and its file
            return f"{checkpoint / min(lost)} is missing, also in the manifest"
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def _verify_names(checkpoint: Path, listed: Set[str]) -> None:
    """CheckpointError unless a checkpoint holds the files that its manifest lists, no others, and what every one has."""
    present = _names(checkpoint) - {_MANIFEST}
    if listed - present:
        raise CheckpointError(f"{checkpoint / min(listed - present)} is missing")
    if present - listed:
        raise CheckpointError(f"{checkpoint / min(present - listed)} is not in the checkpoint's manifest: remove it")
    if _SETTINGS not in listed or not any(name.endswith("_model_states.pt") for name in listed):
        raise CheckpointError(f"{checkpoint / _MANIFEST} is damaged: it must list {_SETTINGS} and a model")


def _verify_file(file: Path, entry: Any) -> None:
    """CheckpointError unless a file has the [size, SHA-256] of its manifest's entry."""
    if not (isinstance(entry, list) and len(entry) == 2):
        raise CheckpointError(f"{file.parent / _MANIFEST} is damaged: {file.name} has no size and SHA-256")
    size, digest = entry
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes, {size} were written (truncated?)")
    if _digest(file) != digest:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one that was written")


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: expected an object, got {type(content).__name__}")
    return content


def _names(folder: Path) -> set[str]:
    """Everything in a folder that is no folder, by its path from there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _find(folder: Path, resume: str, tidy: bool) -> str | None:
    for partial in folder.glob(_PARTIAL + "*") if tidy else ():
        shutil.rmtree(partial, ignore_errors=True)
    candidates = sorted((p for p in folder.glob("step_*") if _NAME.match(p.name)), reverse=True)
    if resume == "never":
        if candidates:
            raise CheckpointError(f"{folder} holds checkpoints, and --resume is never: choose another --output or delete it")
        return None
    for candidate in candidates:
        problem = verify(candidate)
        if problem is None:
            return candidate.name
        logger.warning("skipping %s: %s", candidate.name, problem)
    if candidates:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: restore one, or start anew in another --output")
    if resume == "must":
        raise CheckpointError(f"{folder} holds no checkpoint, and --resume is must")
    return None


def _write_manifest(folder: Path) -> None:
    files = {name: folder / name for name in sorted(_names(folder) - {_MANIFEST})}
    for file in files.values():
        _sync(file)
    manifest = {name: [file.stat().st_size, _digest(file)] for name, file in files.items()}
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
