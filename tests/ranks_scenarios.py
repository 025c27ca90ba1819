"""Run under the launcher: ranks that wait for one another and fail together, for test_ranks.py to read.

ranks_scenarios.py FOLDER; writes FOLDER/rank{R}.json
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from sctd_ds import ConfigError
from sctd_ds.engine import ranks


def outcome(call, *arguments) -> list:
    """What `call` came to: ["result", value], or the error's kind, text, and whether all ranks share it."""
    try:
        return ["result", call(*arguments)]
    except Exception as error:
        return [type(error).__name__, str(error), error.shared]


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    rank = dist.get_rank()

    def slow() -> str:
        time.sleep(6)  # longer than any collective of the group may take
        return f"made by {rank}"

    def fail(error: Exception, on: int) -> str:
        if rank == on:
            raise error
        return f"done by {rank}"

    results = {
        "slow": outcome(ranks.on_first, slow),
        "first fails": outcome(ranks.on_first, lambda: fail(ConfigError("no such key"), on=0)),
        "all": outcome(ranks.on_all, lambda: fail(ConfigError(""), on=-1)),
        "second fails": outcome(ranks.on_all, lambda: fail(ConfigError("no such folder"), on=1)),
        "second has a bug": outcome(ranks.on_all, lambda: fail(UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), on=1)),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
