"""The doctor: what today's DeepSpeed, and token dropping, do to the JSON of an existing recipe.

    python -m sctd_ds.doctor check CONFIG.json [...] [--write]

names every key that DeepSpeed refuses, every key that it ignores without a word, and every setting that cannot go together
with token dropping, each with its remedy. --write puts a repaired copy with an "sctd" block beside the original, as
NAME.sctd.json. The exit code is 0 when nothing is left to do by hand.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from sctd_ds.config import ConfigError, ScTDConfig
from sctd_ds.deepspeed_json import DEEPSPEED_KEYS, block_models, check_deepspeed, leaves, read_json

Kind = Literal["refused", "ignored", "deprecated", "conflict", "missing"]
"""An error in DeepSpeed or here; skipped without a word; still read, but on its way out; against token dropping; to add."""
Repair = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a configuration, and how to put it right in place; `repair` None: by hand."""

    kind: Kind
    key: str
    why: str
    remedy: str
    repair: Repair | None = None


def diagnose(raw: Mapping[str, Any]) -> list[Finding]:
    """Everything that stands between this DeepSpeed configuration and a run with token dropping, in the order of its keys."""
    found = [
        finding
        for check in (_removed, _unknown, _nested, _optimizer, _zero, _precision, _routing, _parallel, _unresolved, _method)
        for finding in check(raw)
    ]
    if not any(finding.kind in ("refused", "deprecated") for finding in found):  # these would be found once more
        try:
            check_deepspeed(raw)
        except ConfigError as error:
            found.append(Finding("refused", str(error).partition(":")[0], str(error), "correct the value"))
    order = list(raw)
    return sorted(found, key=lambda f: order.index(f.key.partition(".")[0]) if f.key.partition(".")[0] in order else len(order))


def repair(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """A repaired copy, and what is still wrong with it and needs a decision."""
    config = json.loads(json.dumps(raw))
    # A repair can uncover another finding (a renamed key, whose block is then looked into), so until nothing changes.
    while True:
        found = diagnose(config)
        open_cases = [finding for finding in found if finding.repair is None]
        if len(open_cases) == len(found):
            return config, open_cases
        for finding in found:
            if finding.repair is not None:
                finding.repair(config)


def _block(raw: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The block at `path`; an empty one where there is none."""
    for key in path:
        inner = raw.get(key)
        raw = inner if isinstance(inner, Mapping) else {}
    return raw


# One function per kind of trouble; each yields what it finds

_INSTEAD = {
    "sparse_attention": "remove it; attention is dense, and token dropping is what saves time now",
    "progressive_layer_drop": "remove it, and the recipe's --progressive_layer_drop; token dropping takes its place",
    "amp": 'remove it; "fp16": {"enabled": true} is the counterpart (apex.amp is gone from apex, too)',
    "curriculum_learning": "remove it; data_efficiency.data_sampling.curriculum_learning is its successor",
    "elasticity": "remove it and set train_batch_size (written: elasticity.max_train_batch_size)",
}


def _removed(raw: Mapping[str, Any]) -> Iterator[Finding]:
    from deepspeed.runtime import config as deepspeed_config

    for key in getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}):
        if key in raw:

            def remove(config: dict[str, Any], key: str = key) -> None:
                block = config.pop(key)
                on = isinstance(block, dict) and block.get("enabled", False)
                if key == "amp" and on and not {"fp16", "bf16"} & config.keys():
                    config["fp16"] = {"enabled": True}
                batch = block.get("max_train_batch_size") if key == "elasticity" and on else None
                if batch is not None:
                    config.setdefault("train_batch_size", batch)

            yield Finding("refused", key, "DeepSpeed has removed it", _INSTEAD.get(key, "remove it"), remove)
    for key in getattr(deepspeed_config, "_REMOVED_ZERO_CONFIG_KEYS", {}):
        if key in _block(raw, "zero_optimization"):

            def remove_inside(config: dict[str, Any], key: str = key) -> None:
                del config["zero_optimization"][key]

            yield Finding("refused", f"zero_optimization.{key}", "DeepSpeed has removed it", "remove it", remove_inside)


def _unknown(raw: Mapping[str, Any]) -> Iterator[Finding]:
    from deepspeed.runtime import config as deepspeed_config

    removed = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    for key in raw:
        if key not in removed and key not in DEEPSPEED_KEYS | {"sctd", "pretrain"}:
            yield _misspelt("ignored", (), key, DEEPSPEED_KEYS | {"sctd"}, raw)


def _nested(raw: Mapping[str, Any]) -> Iterator[Finding]:
    from deepspeed.runtime import config as deepspeed_config

    removed = getattr(deepspeed_config, "_REMOVED_ZERO_CONFIG_KEYS", {})
    models: dict[str, type[BaseModel]] = {**block_models(), "sctd": ScTDConfig}
    for name, model in models.items():
        block = _block(raw, name)
        known = {alias for field, info in model.model_fields.items() for alias in (field, info.alias) if alias}
        for key in block:
            if key not in known and not (name == "zero_optimization" and key in removed):
                yield _misspelt("refused", (name,), key, known, block)


def _misspelt(kind: Kind, path: tuple[str, ...], key: str, known: Iterable[str], block: Mapping[str, Any]) -> Finding:
    near = difflib.get_close_matches(key, sorted(set(known) - set(block)), n=1, cutoff=0.8)
    why = "DeepSpeed does not know it" + ("" if kind == "refused" else " and ignores it without a word")

    def inner(config: dict[str, Any]) -> dict[str, Any]:
        for part in path:
            config = config[part]
        return config

    def rename(config: dict[str, Any]) -> None:
        target = inner(config)
        renamed = {near[0] if name == key else name: value for name, value in target.items()}  # in its old place
        target.clear()
        target.update(renamed)

    if near:
        return Finding(kind, ".".join((*path, key)), why, f'rename it to "{near[0]}"', rename)
    return Finding(kind, ".".join((*path, key)), why, "remove it", lambda config: inner(config).pop(key))


# The 1-bit optimizers are gone; these are the optimizers they compressed.
_ONE_BIT = {"onebitadam": "Adam", "zerooneadam": "Adam", "onebitlamb": "Lamb"}


def _optimizer(raw: Mapping[str, Any]) -> Iterator[Finding]:
    block = _block(raw, "optimizer")
    name = str(block.get("type"))
    plain = _ONE_BIT.get(name.lower())
    if plain:

        def decompress(config: dict[str, Any]) -> None:
            known = {"lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad"}
            known |= {"max_coeff", "min_coeff"} if plain == "Lamb" else set()
            params = config["optimizer"].get("params", {})
            config["optimizer"] = {"type": plain, "params": {k: v for k, v in params.items() if k in known}}

        yield Finding(
            "refused", "optimizer.type", f"{name} has been removed", f'use "{plain}", without compression', decompress
        )
    if "max_grad_norm" in _block(block, "params"):

        def move(config: dict[str, Any]) -> None:
            norm = config["optimizer"]["params"].pop("max_grad_norm")
            config.setdefault("gradient_clipping", norm)

        yield Finding("refused", "optimizer.params.max_grad_norm", "DeepSpeed refuses it here",
                      "use gradient_clipping at the top level", move)  # fmt: skip


def _zero(raw: Mapping[str, Any]) -> Iterator[Finding]:
    if isinstance(raw.get("zero_optimization"), bool):
        stage = int(raw["zero_optimization"])

        def spell_out(config: dict[str, Any]) -> None:
            config["zero_optimization"] = {"stage": stage}

        why = "a bare true or false is a format of the past"
        yield Finding("deprecated", "zero_optimization", why, f'write {{"stage": {stage}}}', spell_out)
    block = _block(raw, "zero_optimization")
    if block.get("stage") == 3:

        def lower(config: dict[str, Any]) -> None:
            config["zero_optimization"]["stage"] = 2
            config["zero_optimization"].pop("offload_param", None)

        yield Finding("conflict", "zero_optimization.stage", "ZeRO-3 would gather every parameter for each of the two passes",
                      "use stage 2", lower)  # fmt: skip
    if block.get("cpu_offload") is not None:

        def offload(config: dict[str, Any]) -> None:
            if config["zero_optimization"].pop("cpu_offload"):
                config["zero_optimization"].setdefault("offload_optimizer", {"device": "cpu"})

        yield Finding("deprecated", "zero_optimization.cpu_offload", "an older name",
                      'write "offload_optimizer": {"device": "cpu"}', offload)  # fmt: skip


def _precision(raw: Mapping[str, Any]) -> Iterator[Finding]:
    on = [key for key in ("fp16", "bf16") if _block(raw, key).get("enabled") is True]
    if len(on) == 2:
        yield Finding("refused", "bf16", "fp16 and bf16 are both enabled", "keep one of them")


def _routing(raw: Mapping[str, Any]) -> Iterator[Finding]:
    routing = _block(raw, "data_efficiency", "data_routing")
    if routing.get("enabled") or _block(routing, "random_ltd").get("enabled"):

        def switch_off(config: dict[str, Any]) -> None:
            block = config["data_efficiency"]["data_routing"]
            block["enabled"] = False
            block.get("random_ltd", {})["enabled"] = False

        yield Finding("conflict", "data_efficiency.data_routing", "random-LTD drops tokens, too, and replaces the layers",
                      "switch it off", switch_off)  # fmt: skip


def _parallel(raw: Mapping[str, Any]) -> Iterator[Finding]:
    if raw.get("sequence_parallel_size", 1) != 1:
        yield Finding("conflict", "sequence_parallel_size", "tokens are chosen from whole rows, which it splits over ranks",
                      "use data parallelism", lambda config: config.pop("sequence_parallel_size"))  # fmt: skip


def _unresolved(raw: Mapping[str, Any]) -> Iterator[Finding]:
    for path, value in leaves(raw):
        if value == "auto" and path[0] not in ("sctd", "pretrain"):
            yield Finding("ignored", ".".join(path), '"auto" means something to the Hugging Face Trainer only',
                          "write the value, unless the Trainer reads this file")  # fmt: skip


def _method(raw: Mapping[str, Any]) -> Iterator[Finding]:
    if "sctd" not in raw:
        settings = ("method", "interval", "drop_ratio", "kl_weight", "keep_token_ids")
        defaults = {name: value for name, value in ScTDConfig().model_dump().items() if name in settings}
        yield Finding("missing", "sctd", "the method's settings", "add the block; set keep_token_ids to UNK, CLS, SEP and MASK",
                      lambda config: config.update(sctd=defaults))  # fmt: skip
    elif not any(finding.key.startswith("sctd.") for finding in _nested(raw)):
        try:
            ScTDConfig(**raw["sctd"])
        except (ConfigError, TypeError) as error:
            yield Finding("refused", "sctd", str(error), "correct the value")


# The command


def check(path: Path, write: bool) -> bool:
    """Report on one file, and write its repaired copy if asked to. Returns whether nothing is left to do by hand."""
    raw, _ = read_json(path)
    found = diagnose(raw)
    print(f"{path}: {f'{len(found)} to do' if found else 'ready for sctd_ds.initialize'}")
    for finding in found:
        by_hand = "" if finding.repair else " (by hand)"
        print(f"  {finding.kind:<12}{finding.key}: {finding.why}\n              -> {finding.remedy}{by_hand}")
    if not write:
        return not found
    config, left = repair(raw)
    target = path.with_suffix(".sctd.json")
    try:
        with target.open("x", encoding="utf-8") as file:  # never over a file that somebody may have edited
            file.write(json.dumps(config, indent=2) + "\n")
    except FileExistsError:
        raise ConfigError(f"{target} is there already: remove it first") from None
    print(f"  written: {target}" + (f"; {len(left)} to do by hand" if left else ""))
    return not left


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 ready, 1 something to do, 2 a file that cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.doctor", description=__doc__.partition("\n")[0])
    command = parser.add_subparsers(required=True).add_parser("check", help="report on DeepSpeed configurations")
    command.add_argument("config", nargs="+", type=Path, help="JSON file of a recipe")
    command.add_argument("--write", action="store_true", help="write the repaired file beside it, as NAME.sctd.json")
    given = parser.parse_args(arguments)
    ready = True
    for path in given.config:
        try:
            ready &= check(path, given.write)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
