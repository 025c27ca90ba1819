"""Fixtures of all tests, and an environment in which one process is a launch of one rank."""

import os
import random
from pathlib import Path

import pytest

from helpers.launch import free_port

# DeepSpeed in the test process itself finds its one rank through the environment.
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A built data set of generated text: 40 training rows of 32 tokens, so an epoch is 5 steps of 8."""
    from sctd_ds import data

    folder = tmp_path_factory.mktemp("small")
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "re", "sal") for b in ("ndo", "ri", "lette", "x", "gam", "s")]
    documents = [" ".join(generator.choice(words) for _ in range(generator.randint(20, 60))) + "." for _ in range(31)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return data.build([str(folder / "text.txt")], folder / "built", vocab_size=300, seq_length=32, validation_fraction=0.1)
