"""Say what the machine is, and which kernels it can import."""

from __future__ import annotations

import importlib.util
import platform
import sys

import torch

from benchmarks.gpu.part import Part

_ASKED = ("triton", "flash_attn", "flashinfer", "safetensors", "numpy", "cudnn")


def main(argv: list[str] | None = None) -> int:
    """Write the document."""
    part = Part(argv)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _ASKED:
        if importlib.util.find_spec(name) is not None:
            versions[name] = str(getattr(__import__(name), "__version__", "here"))
    part.note(versions=versions)
    if part.device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        part.note(
            gpu=found.name,
            capability=[found.major, found.minor],
            processors=found.multi_processor_count,
            memory_gib=found.total_memory / 2**30,
            cuda=torch.version.cuda,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
