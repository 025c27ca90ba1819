"""Run under the launcher: one run that never stops, then the same run resumed from several of its checkpoints.

resume_scenarios.py CONFIG DATA FOLDER STEP [STEP ...]
"""

import shutil
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain


def run(config: str, data: str, output: Path, *more: str) -> None:
    status = pretrain.main(["--deepspeed_config", config, "--data", data, "--output", str(output), *more])
    assert status == 0, f"pretrain ended with {status}"


def main() -> None:
    config, data, folder, *steps = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    whole = Path(folder) / "whole"
    run(config, data, whole)
    for step in steps:
        part = Path(folder) / f"from_{step}"
        if dist.get_rank() == 0:
            shutil.copytree(whole / "checkpoints", part / "checkpoints")
            for checkpoint in (part / "checkpoints").glob("step_*"):
                if int(checkpoint.name.removeprefix("step_")) > int(step):
                    shutil.rmtree(checkpoint)
            shutil.copy(whole / "metrics.jsonl", part / "metrics.jsonl")
        dist.barrier()
        run(config, data, part, "--resume", "must")


main()
