"""Find the C++ compiler that Inductor would use on a CPU, before anything waits for it."""

from __future__ import annotations

import subprocess

from lipass.errors import LipassError

NO_COMPILER = (
    "none found: Inductor cannot compile for the CPU; install g++ (apt-get install g++, "
    "xcode-select --install), or use inner='aot_eager'"
)


def compiler() -> str | None:
    """Return the first line of its version, or its path where it says nothing; None without one.

    It is the one that torch finds, so `CXX` counts.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        path = get_cpp_compiler()
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except (OSError, RuntimeError):  # a compiler that is named and not there, or none at all
        return None
    lines = said.stdout.splitlines()
    return lines[0] if lines else path


def check_compiler(inner: str = "inductor", other: str = "") -> None:
    """Refuse to begin what Inductor could not compile.

    Args:
        inner: the inner compiler.
        other: how the command is told to take another one, if it can be.

    Raises:
        LipassError: no compiler, and no GPU that would need none of C++.
    """
    import torch

    if inner == "inductor" and not torch.cuda.is_available() and compiler() is None:
        raise LipassError(
            "Inductor needs a C++ compiler on a CPU, got none (neither CXX nor g++ runs); install "
            f"g++{f', or pass another inner compiler: {other}' if other else ''}"
        )
