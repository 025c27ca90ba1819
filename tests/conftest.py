"""Shared by all tests: a quiet single-process environment, a small data set, and real DeepSpeed launches."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# DeepSpeed in the test process itself: one rank, found through the environment.
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def launch(
    script: str | Path, *arguments: object, ranks: int, device: str = "cpu", timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS script arguments`, output captured; stdout and stderr come back together.

    device: DeepSpeed's name of it, "cpu" or "cuda". Whatever becomes of the run, it must leave no shared memory behind.
    """
    command = launch_command(script, *arguments, ranks=ranks)
    done = subprocess.run(
        command, cwd=ROOT, text=True, timeout=timeout, env={**launch_environment(), "DS_ACCELERATOR": device},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    port = command[command.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")), done.stdout[-3000:]
    return done


def launch_command(script: str | Path, *arguments: object, ranks: int) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*runner, "--num_gpus", str(ranks), "--master_port", str(free_port()), str(script), *map(str, arguments)]


def launch_environment() -> dict[str, str]:
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    return {**{k: v for k, v in os.environ.items() if k not in ours}, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def settings(**changes: object) -> dict:
    """A run of seconds: 4 layers, 8 rows of 32 tokens a step, an align step every 4."""
    blocks = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": "auto", "warmup_num_steps": 1, "warmup_type": "linear", "total_num_steps": "auto"},
        },
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "sctd": {"interval": 4},
        "pretrain": {
            "model": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64},
            "seq_length": 32, "steps": 14, "validation_every": 5, "validation_rows": 8, "save_every": 1, "keep_last": 100,
            "log_every": 1, "probe_steps": 0,
        },
    }  # fmt: skip
    for key, value in changes.items():
        blocks[key] = {**blocks[key], **value} if isinstance(blocks.get(key), dict) else value
    return blocks


def write_settings(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(settings(**changes)))
    return path


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A built data set of generated text: about 40 training rows of 32 tokens, so an epoch is 5 steps of 8."""
    from sctd_ds import data

    folder = tmp_path_factory.mktemp("small")
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "re", "sal") for b in ("ndo", "ri", "lette", "x", "gam", "s")]
    documents = [" ".join(generator.choice(words) for _ in range(generator.randint(20, 60))) + "." for _ in range(24)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return data.build([str(folder / "text.txt")], folder / "built", vocab_size=300, seq_length=32, validation_fraction=0.1)
