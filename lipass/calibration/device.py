"""Name the device that times are measured on."""

from __future__ import annotations

import platform

import torch


def device_name() -> str:
    """Name the GPU in use, or the CPU with the threads that torch takes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Name the CPU, as the system does."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown CPU"
