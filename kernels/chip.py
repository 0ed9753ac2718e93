"""Say which GPUs the Triton kernels are made for."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from contextlib import AbstractContextManager

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels, on tensors of the host."""

# bf16 and the shared memory that the kernels take; all chips from here on are compiled in tests.
_OLDEST = (8, 0)
_NOTHING = contextlib.nullcontext()


@functools.lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; under the interpreter that of Hopper."""
    if device.type != "cuda":
        return (9, 0)
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Make a device the current one inside, on which Triton launches; nothing where it is."""
    if device.type != "cuda" or _only_one():
        return _NOTHING
    return torch.cuda.device(device)


@functools.cache
def _only_one() -> bool:
    # Entering and leaving a device takes 1 us, three times a call.
    return torch.cuda.device_count() == 1


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Return how many programs of a large kernel run at once."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=16)
def name(device: torch.device) -> str:
    """Return what a GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def triton_version() -> str:
    """Return the version of Triton, or nothing where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.lru_cache(maxsize=16)
def why_not(device: torch.device) -> str | None:
    """Give the reason why no Triton kernel of this project runs on a device, or None."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"runs on CUDA tensors, got {device.type}"
    if torch.version.hip:
        return f"is made for NVIDIA GPUs, got ROCm {torch.version.hip}"
    if (found := capability(device)) < _OLDEST:
        return (
            f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]}, which bf16 does too, got "
            f"{found[0]}.{found[1]}"
        )
    return None
