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

    `pointers` gives the types of pointers and of descriptors of tensors, `constants` all that is
    known to the compiler. Strides that match `aligned` are divisible by 16, as all pointers are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

    types, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = pointers[name]
        else:
            types[name] = "fp32" if name == "scale_log2" else "i32"
        if name.endswith("_ptr") or re.fullmatch(aligned, name):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def stack_bytes(binary):
    """Read the stack of one thread from the binary; skip where the tool is missing."""

    return int(re.search(r"STACK:(\d+)", _told(binary, "cuobjdump", "-res-usage")).group(1))


def machine_code(binary):
    """List the instructions of a binary, as text."""
    listing = _told(binary, "nvdisasm", "-c")
    return [found.group(1) for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)]


def product_loops(binary):
    """List the innermost loops of a Hopper kernel that multiply on tensor cores.

    Each is `(instructions, products, loads)`: what a warp issues in one turn in which no branch
    inside the loop is entered, tensor core products and loads of the TMA unit.
    """
    lines, labels = [], {}
    for line in _told(binary, "nvdisasm", "-c").splitlines():
        if found := re.match(r"\s*(\.L_[\w.]+):", line):
            labels[found.group(1)] = len(lines)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found.group(1))
    jumps = {
        at: labels[found.group(1)]
        for at, line in enumerate(lines)
        if (found := re.search(r"BRA.*`\((\.L_[\w.]+)\)", line))
    }
    loops = [
        (to, at)
        for at, to in jumps.items()
        if to <= at
        and any("HGMMA" in line for line in lines[to:at])
        and not any("EXIT" in line for line in lines[to:at])  # retries of waits, out of line
    ]
    found = []
    for to, at in loops:
        if any(other != (to, at) and to <= other[0] and other[1] <= at for other in loops):
            continue
        body, skipped = lines[to : at + 1], 0
        for inner in range(to, at):
            if inner < jumps.get(inner, 0) <= at:  # a branch over what is seldom done
                skipped += jumps[inner] - inner - 1
        count = [sum(name in line for line in body) for name in ("HGMMA", "UTMALDG")]
        found.append((len(body) - skipped, *count))
    return found


def _told(binary, name, *flags):
    """Return what a tool of the CUDA toolkit says of a binary; skip where it is missing."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not tool.exists():
        pytest.skip(f"needs {name}")
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"lipass-{os.getpid()}.cubin"
    file.write_bytes(binary.asm["cubin"])
    try:
        return subprocess.run([tool, *flags, file], capture_output=True, text=True).stdout
    finally:
        file.unlink()
