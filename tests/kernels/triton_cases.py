"""Try Triton kernels without a GPU: interpreted in a process apart, or compiled for a chip."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Shared memory in KiB that one program may use, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def interpret(script, checks):
    """Run a script of this folder under the interpreter; it prints a line for each check."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == checks


def compile_for(chip, kernel, pointers, constants, aligned="", **options):
    """Compile a kernel ahead of time as the JIT would for one call.

    `pointers` gives the types of pointers, `constants` all that is known to the compiler, and
    strides that match `aligned` are divisible by 16, as all pointers are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = pointers[name]
        else:
            types[name] = "fp32" if name == "scale_log2" else "i32"
        if name.endswith("_ptr") or re.fullmatch(aligned, name):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def stack_bytes(binary):
    """Read the stack of one thread from the binary; skip where the tool is missing."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("needs cuobjdump")
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"lipass-{os.getpid()}.cubin"
    file.write_bytes(binary.asm["cubin"])
    try:
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True)
    finally:
        file.unlink()
    return int(re.search(r"STACK:(\d+)", done.stdout).group(1))
