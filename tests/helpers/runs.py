"""Runs of pretrain.py that last seconds: their settings, what they record, and how two of them are compared."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from sctd_ds import data, pretrain
from sctd_ds.run import metrics

STEPS, INTERVAL, EPOCH = 14, 4, 5
"""Steps of a run, steps from one align step to the next, and steps of an epoch of the fixture `small_data`."""


STABLE_DECAY = {
    "type": "transformers.warmup_stable_decay",
    "params": {"num_warmup_steps": 2, "num_decay_steps": 0.3, "decay_type": "linear"},
}
"""A "scheduler" block."""


def settings(**changes: object) -> dict:
    """A small run's configuration: 4 layers, 8 rows of 32 tokens a step. A changed block keeps its other keys, but
    "scheduler" is replaced."""
    schedule = {"warmup_max_lr": "auto", "warmup_num_steps": 1, "warmup_type": "linear", "total_num_steps": "auto"}
    blocks = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": schedule},
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "sctd": {"interval": INTERVAL},
        "pretrain": {
            "model": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64},
            "seq_length": 32,
            "steps": STEPS,
            "validation_every": 5,
            "validation_rows": 8,
            "save_every": 1,
            "keep_last": 100,
            "log_every": 1,
            "probe_steps": 0,
        },
    }
    for key, value in changes.items():
        merges = isinstance(blocks.get(key), dict) and key != "scheduler"
        blocks[key] = {**blocks[key], **value} if merges else value
    return blocks


def write_settings(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(settings(**changes)))
    return path


def build_small_data(folder: Path) -> Path:
    """A built data set of generated text: 40 training rows of 32 tokens, so an epoch is 5 steps of 8."""
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "re", "sal") for b in ("ndo", "ri", "lette", "x", "gam", "s")]
    documents = [" ".join(generator.choice(words) for _ in range(generator.randint(20, 60))) + "." for _ in range(31)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return data.build([str(folder / "text.txt")], folder / "built", vocab_size=300, seq_length=32, validation_fraction=0.1)


# A run that never stops, and the same run continued from its checkpoints. Every rank calls these; a launch that does both,
# several times, saves the start of as many launches.


def train_whole_run(file: Path, output: Path, *more: str) -> None:
    """The run that `file` describes, its data included, in the folder `output`."""
    status = pretrain.main(["--deepspeed_config", str(file), "--output", str(output), *more])
    assert status == 0, f"pretrain ended with {status}"


def continue_run(file: Path, whole: Path, output: Path, step: int) -> None:
    """Copy the finished run `whole` as it was when it had saved its checkpoint of `step`, and continue it in `output`."""
    if dist.get_rank() == 0:
        shutil.copytree(whole / "checkpoints", output / "checkpoints")
        for checkpoint in (output / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > step:
                shutil.rmtree(checkpoint)
        shutil.copy(whole / "metrics.jsonl", output / "metrics.jsonl")
    dist.barrier()
    train_whole_run(file, output, "--resume", "must")


def records(run: Path) -> list[dict]:
    """What a run recorded, without the times."""
    timing = ("step_ms", "tokens_per_s")
    return [{k: v for k, v in r.items() if k not in timing} for r in metrics.read(run / "metrics.jsonl")]


def assert_same_end(one: Path, other: Path) -> None:
    """Losses, rates, norms and validations of every step, and every tensor of the last checkpoint: bit for bit."""
    assert records(one) == records(other)
    last = sorted((one / "checkpoints").glob("step_*"))[-1].name
    files = sorted(p.name for p in (one / "checkpoints" / last).glob("*.pt"))
    assert files == sorted(p.name for p in (other / "checkpoints" / last).glob("*.pt")) and len(files) >= 3
    for file in files:
        a, b = (torch.load(run / "checkpoints" / last / file, weights_only=False) for run in (one, other))
        assert_equal(a, b, file)


def assert_equal(a: object, b: object, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}:{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}:{i}")
    elif isinstance(a, int | float | str | bool | None):
        assert a == b, where
