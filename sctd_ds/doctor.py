"""The doctor: what today's DeepSpeed, and token dropping, do to the JSON of an existing recipe.

    python -m sctd_ds.doctor CONFIG.json [...] [--write]

names every key that DeepSpeed refuses, every key that it ignores without a word, and every setting that cannot go together
with token dropping, each with its remedy. --write puts a repaired copy with an "sctd" block beside the original, as
NAME.sctd.json. The exit code is 0 when nothing is left to do by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sctd_ds.config import ConfigError, read_json
from sctd_ds.deepspeed_json import Finding, diagnose, repair


def examine(path: Path, write: bool) -> bool:
    """Report on one file, and write its repaired copy if asked to. Returns whether nothing is left to do by hand."""
    raw, _ = read_json(path)
    found = diagnose(raw)
    reader = "pretrain.py" if "pretrain" in raw else "sctd_ds.initialize"
    print(f"{path}: {f'{len(found)} to do' if found else f'ready for {reader}'}")
    for finding in found:
        print(_lines(finding))
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


def _lines(finding: Finding) -> str:
    by_hand = "" if finding.repair else " (by hand)"
    return f"  {finding.kind:<12}{finding.why}\n              -> {finding.remedy}{by_hand}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 ready, 1 something to do, 2 a file that cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m sctd_ds.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="+", type=Path, help="JSON file of a recipe")
    parser.add_argument("--write", action="store_true", help="write the repaired file beside it, as NAME.sctd.json")
    given = parser.parse_args(arguments)
    ready = True
    for path in given.config:
        try:
            ready &= examine(path, given.write)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
