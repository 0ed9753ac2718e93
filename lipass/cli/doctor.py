"""Show versions, devices, and which kernels can run here and why others cannot.

With --model and --checkout: examine the user's own checkout of a released model instead.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lipass.cli.terminal import paragraph
from lipass.cli.toolchain import NO_COMPILER, compiler

SUMMARY = "show versions, devices and kernels; or examine a checkout of a released model"
SCHEMA_VERSION = 1

_PACKAGES = ("lipass", "torch", "triton", "numpy", "networkx", "sympy", "rich", "matplotlib")
_BACKEND = "light_interaction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--model", metavar="FAMILY", help="family of a checkout to examine")
    parser.add_argument(
        "--checkout",
        metavar="PATH",
        help="folder of the model's code, which is imported and run in a small random "
        "configuration; nothing is installed or written there",
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings; fail if torch does not know the backend, or a check does not hold."""
    if args.model or args.checkout:
        from lipass.cli.examination import examination, lines

        examined = examination(args.model, args.checkout)
        print(json.dumps(examined, indent=1) if args.json else "\n".join(lines(examined)))
        return 0 if examined["holds"] else 1
    found = findings()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(_lines(found)))
    return 0 if found["backend_registered"] else 1


def findings() -> dict:
    """Collect what a bug report needs, as JSON-able data."""
    import torch

    found = {
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: _version(name) for name in _PACKAGES},
        "backend_registered": _BACKEND in torch._dynamo.list_backends(None),
        "devices": _devices(),
        "compiler": compiler(),
        "caches": _caches(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("LIPASS")},
        "providers": list(_providers()),
    }
    return {**found, "next": list(_next(found))}


def _next(found: dict) -> Iterator[str]:
    """Say what to do about what was found."""
    if not found["backend_registered"]:
        yield f"register the backend: {sys.executable} -m pip install lipass"
    on_cpu = len(found["devices"]) == 1
    if on_cpu and not found["compiler"]:
        yield "install a C++ compiler (apt-get install g++), or compile with inner='aot_eager'"
    for name, folder in found["caches"].items():
        if (why := _why_unwritable(Path(folder))) is not None:
            variable = "TORCHINDUCTOR_CACHE_DIR" if name == "inductor" else "XDG_CACHE_HOME"
            yield f"set {variable} to a folder that can be written, {folder} cannot: {why}"
    slow = [
        one for one in found["providers"]
        if one["provider"] in _FAST and one["device"] in _FAST[one["provider"]] and one["why_not"]
    ]  # fmt: skip
    for one in slow:
        remedy = "; `make demo` or lipass.kernels.prepare() builds it" * (
            one["provider"] == "native"
        )
        yield f"{one['operation']} by {one['provider']} does not run: {one['why_not']}{remedy}"
    if os.environ.get("LIPASS") == "off":
        yield "unset LIPASS: it switches lipass off in this shell"
    yield "lipass inspect FILE:CALLABLE shows what becomes of a model; lipass demo shows one run"


# The providers that are fast, and where; others only take over from them.
_FAST = {"native": ("cpu",), "triton": ("cuda",)}


def _why_unwritable(folder: Path) -> str | None:
    """Try the nearest folder that exists, as the cache is made on first use."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict]:
    import torch

    from lipass.calibration.device import cpu_name

    devices = [
        {
            "device": "cpu",
            "name": cpu_name(),
            "detail": f"{torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
        }
    ]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "detail": f"sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB, "
                f"{about.multi_processor_count} SMs",
            }
        )
    return devices


def _caches() -> dict[str, str]:
    """Name the folders in which later processes find what was compiled and measured."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from lipass.kernels.block_sparse.native import cache_folder

    return {"inductor": cache_dir(), "kernels": str(cache_folder())}


def _providers() -> Iterator[dict]:
    """Ask every provider of every kernel whether it takes a call of one tile, on every device."""
    import torch

    for operation in ("pool", "select", "block_sparse"):
        package = importlib.import_module(f"lipass.kernels.{operation}")
        for found in pkgutil.iter_modules(package.__path__):
            for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
                try:
                    module = importlib.import_module(f"{package.__name__}.{found.name}")
                except ImportError as error:
                    reason = f"not importable: {error}"
                else:
                    if not hasattr(module, "why_not"):
                        continue  # the operation's interface, not a provider of it
                    reason = module.why_not(*_one_tile(operation, device))
                yield {
                    "operation": operation,
                    "provider": found.name,
                    "device": device,
                    "why_not": reason,
                }


def _one_tile(operation: str, device: str) -> tuple:
    import torch

    from lipass.kernels.block_sparse.kind import kind_of
    from lipass.kernels.plan import BlockGrid, KvLayout, Segment

    grid = BlockGrid((4, 4, 4), (4, 4, 4))
    # What is usual there: attention in fp32 has no kernel on a GPU.
    dtype = torch.bfloat16 if device == "cuda" and operation == "block_sparse" else torch.float32
    x = torch.zeros(1, 1, grid.tokens, 64, device=device, dtype=dtype)
    if operation == "pool":
        return x, grid
    if operation == "select":
        return x, x, None
    return (kind_of(x, grid, KvLayout((Segment("current", grid),))),)


def _lines(found: dict) -> Iterator[str]:
    yield f"system     {found['system']}, Python {found['python']}"
    for name, version in found["versions"].items():
        yield f"{name:<10} {version or 'not installed'}"
    registered = "registered with torch" if found["backend_registered"] else _MISSING
    yield f"backend    {_BACKEND}: {registered}"
    yield f"compiler   {found['compiler'] or NO_COMPILER}"
    for name, folder in found["caches"].items():
        yield f"cache      {name}: {folder}"
    for device in found["devices"]:
        yield f"{device['device']:<10} {device['name']}, {device['detail']}"
    if len(found["devices"]) == 1:
        yield "cuda       none: torch finds no CUDA device"
    for name, value in found["environment"].items():
        yield f"{name}={value}"
    yield ""
    yield "kernel        provider    device  runs"
    for line in found["providers"]:
        verdict = "yes" if line["why_not"] is None else f"no: {line['why_not']}"
        yield f"{line['operation']:<13} {line['provider']:<11} {line['device']:<7} {verdict}"
    yield ""
    yield "what to do next"
    for step in found["next"]:
        yield from paragraph(f"- {step}", 2, hanging=2)


_MISSING = f"NOT registered; reinstall with {sys.executable} -m pip install lipass"
