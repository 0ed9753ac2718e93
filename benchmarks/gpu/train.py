"""Train TinyWorld `base` for as long as is left, where its training can run on this device."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from benchmarks.gpu.part import Part

_MODULE = "lipass.examples.tinyworld.train"
# For what is written at the end.
_SPARE_S = 20.0
# Rooms are rendered first; less is no training.
_LEAST_S = 60.0


def main(argv: list[str] | None = None) -> int:
    """Write why nothing was trained, or what the training said."""
    part = Part(argv)
    if reason := _why_not(part):
        part.row(trained=False, reason=reason)
        return 0
    out = part.folder / "tinyworld"
    command = [sys.executable, "-m", _MODULE, "--size", "base", "--device", part.device.type]
    command += ["--seconds", str(part.left_s - _SPARE_S), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    part.row(trained=done.returncode == 0, said=done.stderr[-2000:], folder=str(out))
    return done.returncode


def _why_not(part: Part) -> str:
    if importlib.util.find_spec("safetensors") is None:
        return "not available: weights are read and written with safetensors, which is missing"
    asked = [sys.executable, "-m", _MODULE, "--help"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    if said.returncode != 0:
        return f"not available: {said.stderr[-300:]}"
    if "--device" not in said.stdout:
        return f"not available: {_MODULE} has no --device, so it trains on a CPU only"
    if part.left_s < _LEAST_S or part.dry:
        return f"{part.left_s:.0f} s are too few"
    return ""


if __name__ == "__main__":
    sys.exit(main())
