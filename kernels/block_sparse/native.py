"""Attend with a C++ kernel (`native.cpp`), built by `build()` and cached; never on a first frame.

The compiler is called as such: `torch.utils.cpp_extension.load` needs ninja, which neither torch
nor this project depends on, and waits for ever on the lock of a process that was killed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.select.vectorized import Rule

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
READS_ORDER = True

_loaded = False
# Why the kernel cannot be had in this process; asked for once, then remembered.
_failure: str | None = None
# Whether this process has tried to build it.
_tried = False


def why_not(kind: Kind) -> str | None:
    """Refuse what is not on the CPU, and everything while the kernel is not built."""
    if kind.device.type != "cpu":
        return f"runs on CPU tensors, got {kind.device.type}"
    if kind.dtype not in DTYPES:
        return f"computes in fp32, bf16 and fp16, got {kind.dtype}"
    if kind.records:
        return "has no backward, and q, k, v or a bias requires one"
    return why_not_loaded()


def why_not_loaded() -> str | None:
    """Return why the kernel cannot be called; loads it if an earlier process has built it."""
    if _loaded:
        return None
    if _failure is not None:
        return _failure
    library = _library()
    if not os.path.exists(library):  # a folder that may not be read holds none, and is no error
        return "not built yet; call lipass.kernels.prepare()"
    if why := _load(library):
        return _give_up(
            f"could not be loaded: {why}",
            f"call lipass.kernels.prepare(), which builds it anew, or delete {library}",
        )
    return None


def build() -> str | None:
    """Build the kernel unless it is cached, and load it; return why not if that fails.

    What is cached and cannot be loaded is built anew, once: a library that cannot be loaded right
    after that stays, so that no later process builds in vain. A failure is logged once and
    remembered for the process.
    """
    global _tried
    if _loaded:
        return None
    if _tried:
        return _failure
    _tried = True
    library = _library()
    in_vain = library.with_suffix(".unloadable")
    try:
        if library.exists() and not in_vain.exists():
            if _load(library) is None:
                return None
            library.unlink()
        _compile(library)
        why = _load(library)
        if why is None:
            in_vain.unlink(missing_ok=True)
            return None
        in_vain.touch()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return _give_up(
            f"could not be built: {error}",
            f"where files cannot be written to {library.parent}, set XDG_CACHE_HOME to a folder "
            "of yours",
        )
    return _give_up(
        f"could not be loaded: {why}",
        f"set XDG_CACHE_HOME to a folder whose files may be executed, or delete {library}",
    )


def _give_up(reason: str, remedy: str) -> str:
    """Remember why the kernel cannot be had, and say it once with what may help."""
    global _failure
    if reason != _failure:
        log.warning("native block-sparse attention %s; gathering instead; %s", reason, remedy)
    _failure = reason
    return reason


def prepare() -> str:
    """Build or load what runs compiled, before the first frame; return why not, or nothing.

    Building takes some ten seconds, once per machine; later processes load what was built.
    """
    return build() or ""


def block_sparse_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    plan: BlockPlan,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend; see `lipass.kernels.block_sparse.api`."""
    order = plan.order
    out, lse = torch.ops.lipass_native.attend(
        q,
        keys,
        values,
        plan.indices,
        plan.counts,
        _numbers(plan.q_grid, plan.kv),
        scale,
        plan.key_keep,
        key_bias,
        return_lse,
        None if order is None else order.queries,
        None if order is None else order.keys,
        -1 if order is None else order.segment,
    )
    return out, lse if return_lse else None


def plan_blocks(
    q: Tensor,
    k: Tensor,
    q_grid: BlockGrid,
    layout: KvLayout,
    rule: Rule,
    k_means: Tensor | None = None,
) -> Tensor:
    """Pool queries and candidate keys, and choose by their means: block ids `[B, H, Nq, S]`.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys of the candidate segment `[B, H, L, D]`.
        q_grid: grid of the queries.
        layout: the key segments.
        rule: what follows from shapes and options; see `lipass.kernels.select`.
        k_means: means of the blocks of `k` `[B, H, Nc, D]` fp32, if they are known.
    """
    return torch.ops.lipass_native.plan(
        q,
        k,
        [*q_grid.grid, *q_grid.tile, *rule.grid.grid, *rule.grid.tile],
        rule.protected,
        rule.wanted,
        rule.candidates.start,
        layout.blocks - rule.candidates.stop,
        k_means,
    )


@functools.lru_cache(maxsize=512)
def _numbers(q_grid: BlockGrid, layout: KvLayout) -> list[int]:
    """Flatten grid and tile of the queries and of each segment."""
    grids = [q_grid, *(segment.grid for segment in layout.segments)]
    return [number for grid in grids for number in (*grid.grid, *grid.tile)]


def _load(library: Path) -> str | None:
    """Load a library; return why not if that fails."""
    global _loaded
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return str(error)
    _loaded = True
    return None


@functools.lru_cache(maxsize=1)
def _library() -> Path:
    key = hashlib.sha256(machine().encode()).hexdigest()[:16]
    return cache_folder() / f"block_sparse_{key}.so"


def machine() -> str:
    """Describe all that the built kernel depends on: its sources, torch, processor and flags."""
    sources = [_SOURCE, *sorted(_SOURCE.parent.glob("native_*.h"))]
    texts = [source.read_text() for source in sources]
    return "\n".join([torch.__version__, _processor(), *_flags(), *texts])


def cache_folder() -> Path:
    """Return where files live that are made once per machine."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "lipass"
    try:
        return Path.home() / ".cache" / "lipass"
    except RuntimeError:  # a user of whom the system has no entry, as in containers
        return _homeless_cache() / "lipass"


@functools.lru_cache(maxsize=1)
def _homeless_cache() -> Path:
    """Return a folder of temporary files that no other user writes to: code is loaded from it."""
    if hasattr(os, "getuid"):
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            held = folder.lstat()
            shared = held.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if stat.S_ISDIR(held.st_mode) and held.st_uid == os.getuid() and not shared:
                return folder
    return Path(tempfile.mkdtemp())


def _processor() -> str:
    """Describe what `-march=native` stands for."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.split()))
    return f"{platform.machine()} {platform.processor()}"


def _flags() -> list[str]:
    found = torch.backends.cpu.get_cpu_capability()
    capability = found if found in ("AVX2", "AVX512") else "DEFAULT"
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    return [*flags, f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]


def _compile(library: Path) -> None:
    """Compile into a file of its own and rename it, so that nobody loads half a library.

    Raises:
        RuntimeError: if there is no compiler, or with what it said.
    """
    if platform.system() != "Linux":
        raise RuntimeError(f"needs Linux, got {platform.system()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise RuntimeError("needs a C++ compiler, found none; install g++ or set CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(library.with_suffix(".lock")):
        if library.exists():
            return
        libraries = Path(torch.__file__).parent / "lib"
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [*compiler.split(), *_flags(), str(_SOURCE), "-o", str(made)]
            command += [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                said = [line for line in done.stderr.splitlines() if "error" in line]
                raise RuntimeError(f"{command[0]} failed: {' | '.join(said[:3]) or done.stderr}")
            os.replace(made, library)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Let processes build one after another; the lock goes with the process that holds it."""
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
