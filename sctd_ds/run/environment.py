"""Where a figure was measured: the device, the versions and the commit, recorded beside every result."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit matrix peak in FLOP/s by a part of the device's name, from the vendors' data sheets; the first match counts."""


@dataclass(frozen=True)
class Environment:
    """What every recorded result says about its origin."""

    device: str
    commit: str
    torch: str
    triton: str
    cuda: str
    python: str
    date: str

    @classmethod
    def collect(cls, device_type: str | None = None) -> Environment:
        """This process's environment. device_type: see `device_name`."""
        device_type = device_type or _device_type()
        return cls(
            device=device_name(device_type),
            commit=commit(),
            **versions("torch", "triton"),
            cuda=torch.version.cuda or "none" if device_type == "cuda" else "none",
            python=platform.python_version(),
            date=time.strftime("%Y-%m-%d"),
        )

    @property
    def folder_name(self) -> str:
        """The device as a folder's name, for results that are kept by device."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


def device_name(device_type: str | None = None) -> str:
    """The name of the device. device_type: "cuda" or "cpu"; None: "cuda" where torch sees a GPU."""
    if (device_type or _device_type()) != "cpu":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def peak_flops(device: str) -> float | None:
    """The dense 16-bit peak of a device by its name, in FLOP/s; None where it is not known."""
    for name, peak in PEAK_FLOPS.items():
        if name in device:
            return peak
    return None


def commit() -> str:
    """The commit of this code: SCTD_COMMIT where a copy without its history runs, else git's answer, else "unknown"."""
    if "SCTD_COMMIT" in os.environ:
        return os.environ["SCTD_COMMIT"]
    # An installed package may lie in somebody else's repository, whose commit says nothing about it.
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return "unknown"
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def versions(*packages: str) -> dict[str, str]:
    """The installed versions; "unknown" for a package that is not installed, for example one that is only on the path."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
