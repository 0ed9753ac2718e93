"""Say on what, with which versions and at which commit a measurement was taken."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "lipass")


def environment() -> dict[str, object]:
    """Describe device, versions and commit, for the documents under `benchmarks/results`."""
    return {
        "device": _device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("diff", "--stat") else ""),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    amx = " with AMX" if "amx_tile" in Path("/proc/cpuinfo").read_text() else ""
    return f"{names[0] if names else platform.machine()}{amx}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
