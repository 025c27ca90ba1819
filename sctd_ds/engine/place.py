"""Which of how many processes this one is, whatever started it.

torch.distributed and DeepSpeed read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment, as
`deepspeed`, torchrun and Accelerate set them. `find` fills in what others leave out: srun and mpirun number their processes
under names of their own, and a process that nobody numbered is a run of one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from sctd_ds.config import ConfigError

NUMBERED_BY = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
"""Names of rank, world size and local rank. mpirun runs inside of Slurm tasks, and Slurm's tasks have MPICH's names, too."""


@dataclass(frozen=True)
class Place:
    """A process among those of the run."""

    rank: int
    world: int
    local_rank: int
    """Among those of this machine."""
    launched: bool
    """Whether a launcher started it (`deepspeed`, torchrun, Accelerate), whose end is that of its processes."""
    note: str = ""
    """For the user: who numbered the processes and where they meet, if that was found out here."""


def find(environment: MutableMapping[str, str] = os.environ) -> Place:
    """This process's place; the variables that DeepSpeed reads are set where they are missing.

    Raises ConfigError where rank 0 or the number of processes is not known, or a variable is not a number.
    """
    note, launched = "", bool({"RANK", "WORLD_SIZE"} & environment.keys())
    if not launched:
        starter = next((name for name, (rank, *_) in NUMBERED_BY.items() if rank in environment), None)
        note = _take_over(starter, environment) if starter else ""
    world = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0 if world == 1 else None)
    local_rank = _number(environment, "LOCAL_RANK", 0)  # without one, whoever started the process has given it its device
    if world == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys() and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            f"this is rank {rank} of {world}, and nothing says where rank 0 is: set MASTER_ADDR to its host and MASTER_PORT to "
            "a port that is free there (`mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...`)"
        )
    return Place(rank, world, local_rank, launched, note)


def _take_over(starter: str, environment: MutableMapping[str, str]) -> str:
    """Copy `starter`'s numbers under the usual names, and, for Slurm, where rank 0 is. Returns the note."""
    rank, world, local_rank = NUMBERED_BY[starter]
    environment["RANK"], environment["WORLD_SIZE"] = environment[rank], environment.get(world, "1")
    environment["LOCAL_RANK"] = environment.get(local_rank, "0")
    if torch.cuda.device_count() == 1:  # as with `srun --gpus-per-task=1`, which shows each task its own device only
        environment["LOCAL_RANK"] = "0"
    if starter != "Slurm" or environment["WORLD_SIZE"] == "1":
        return ""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or socket.gethostname()
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    # The same on all nodes, and another one for each job that shares them.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "9500")) % 10000))
    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    alone = "" if "SLURM_STEP_ID" in environment else " (srun did not start this one: it waits for tasks that srun starts)"
    return f"Slurm: {environment['WORLD_SIZE']} tasks meet at {where}{alone}"


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[003-004,009],login1" -> "gpu003"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _number(environment: MutableMapping[str, str], name: str, default: int | None) -> int:
    """A variable as a number, set to `default` where it is missing."""
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        given = f'{name}="{text}"' if text else f"WORLD_SIZE is set and {name} is not"
        raise ConfigError(f"{given}: a launcher sets {name} to a number; unset RANK and WORLD_SIZE to train in one process")
    environment[name] = text
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
