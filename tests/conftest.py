"""Fixtures of all tests, and an environment in which one process is a launch of one rank."""

import os
from pathlib import Path

import pytest

from helpers.launch import free_port

# DeepSpeed in the test process itself finds its one rank through the environment.
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """See `build_small_data`."""
    from helpers.runs import build_small_data

    return build_small_data(tmp_path_factory.mktemp("small"))
