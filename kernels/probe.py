"""Try a kernel that nobody has seen run, in a process of its own, before a model may use it.

Such a kernel may hang the GPU, crash, or be wrong in one call of many. The process compares calls
with attention in fp32, again and again, and has a time limit, so that none of this costs more than
that. What came of it is kept for the GPU, dtype, head dim, volume of a tile, versions and source
of the kernels. A process that could not begin, as where memory is full, says nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels import fastest
from lipass.kernels.block_sparse.kind import Asking, Kind
from lipass.kernels.fastest import GpuKind
from lipass.kernels.plan import BlockGrid, KvLayout, Triple

# Compiling takes most of it.
LIMIT_S = 120.0
_REPEATS, _HEADS = 20, 16
_BEGUN = "begun"
_TILES = {64: (4, 4, 4), 128: (4, 8, 4)}

_outcomes: dict[tuple[str, GpuKind], str] = {}
"""Why a provider may not be used, of those that were tried; nothing where it may."""
_trusted: set[str] = set()


class _Problem(NamedTuple):
    """A call that is tried."""

    text: int
    history: Triple
    current: Triple
    in_runs: bool = False
    """Whether blocks are runs of tokens."""
    known: bool = True
    """Whether the plan says which segments are visited whole."""


# Each is compiled anew.
_PROBLEMS = {
    "whole tiles": _Problem(512, (8, 16, 32), (4, 16, 32)),
    "whole runs": _Problem(512, (8, 16, 32), (4, 16, 32), in_runs=True),
    "tails": _Problem(33, (5, 9, 13), (4, 9, 13)),
    "runs of segments that are not known": _Problem(33, (5, 9, 13), (4, 9, 13), True, False),
}


def why_not(provider: str, kind: Kind) -> str | None:
    """Say why a provider may not be used for such calls, as far as trying it has shown."""
    if provider in _trusted:
        return None
    key = provider, _tried(kind)
    if key not in _outcomes:
        found = fastest.read(key[1], f"probe_{provider}")
        if not isinstance(found, str):
            return "not tried on this GPU yet; compiling a model for it does so"
        _outcomes[key] = found
    return _outcomes[key] or None


@contextlib.contextmanager
def trusted(provider: str) -> Iterator[None]:
    """Let a provider be used without a probe inside: where this process is one, or may hang."""
    _trusted.add(provider)
    try:
        yield
    finally:
        _trusted.discard(provider)


def try_out(provider: str, kind: Kind, limit_s: float = LIMIT_S) -> str:
    """Try a provider unless that was done before; return why it may not be used, or nothing."""
    key = provider, _tried(kind)
    if why_not(provider, kind) is None:
        return ""
    if key not in _outcomes:
        _outcomes[key], lasts = _run(_command(provider, key[1]), limit_s)
        if lasts:
            fastest.keep(key[1], f"probe_{provider}", _outcomes[key])
    return _outcomes[key]


def _tried(kind: Kind) -> GpuKind:
    return GpuKind(kind.device, kind.dtype, kind.dim, kind.k_volume)


def _command(provider: str, kind: GpuKind) -> list[str]:
    given = [provider, str(kind.device), str(kind.dtype).removeprefix("torch."), kind.dim]
    return [sys.executable, "-m", "lipass.kernels.probe", *map(str, given), str(kind.volume)]


def _run(command: list[str], limit_s: float) -> tuple[str, bool]:
    """Run a probe; say why it failed, or nothing, and whether that is so in other processes."""
    path = os.pathsep.join(filter(None, sys.path))
    # Where it is begun, there may be a folder of this name that is not the package.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"no process could be begun to try it: {error}", False
    try:
        said, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):  # what it has started goes too
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        if not said.startswith(_BEGUN):
            return f"trying it did not begin within {limit_s:.0f} s", False
        return f"did not end within the {limit_s:.0f} s that trying it may take", True
    if not said.startswith(_BEGUN):
        return f"trying it could not begin: {_last_line(errors)}", False
    if process.returncode:
        return f"trying it failed with {process.returncode}: {_last_line(errors)}", True
    why = said.splitlines()[-1].removeprefix(_BEGUN).strip()
    return (f"was tried and is wrong: {json.loads(why)}" if why else ""), True


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:200]


def main(argv: list[str] | None = None) -> int:
    """Try a provider: `python -m lipass.kernels.probe PROVIDER DEVICE DTYPE DIM VOLUME`."""
    provider, device, dtype, dim, volume = sys.argv[1:] if argv is None else argv
    kind = GpuKind(torch.device(device), getattr(torch, dtype), int(dim), int(volume))
    torch.zeros(1, device=kind.device)  # what fails here is no fault of the kernel
    _answer(_BEGUN)
    with trusted(provider), torch.inference_mode():
        why = wrong(provider, kind, _REPEATS, _HEADS)
    if why:
        _answer(json.dumps(why))
    return 0


def _answer(line: str) -> None:
    """Tell the process that asked, which reads this one's standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wrong(provider: str, kind: GpuKind, repeats: int, heads: int) -> str:
    """Compare calls of a kind with attention in fp32; name the first that is wrong, or nothing."""
    from lipass.kernels.registry import module_of

    module = module_of("block_sparse", provider)
    if isinstance(module, str):
        return module
    taken = 0
    for name, problem in _PROBLEMS.items():
        call = _Call(problem, kind, heads)
        asking = Asking(call.q, call.k, call.v, call.q_grid, call.layout, False)
        if asking(module) is not None:
            continue
        taken += 1
        if why := call.compare(module, repeats):
            return f"{name}: {why}"
    return "" if taken else "it takes no call of the kind"


class _Call:
    """Tensors of one problem."""

    def __init__(self, problem: _Problem, kind: GpuKind, heads: int) -> None:
        from lipass.kernels.planning import plan_attention

        tile = _TILES[kind.volume]
        grids = [(1, 1, problem.text), problem.history, problem.current]
        if problem.in_runs:
            grids, tile = [(1, 1, t * y * x) for t, y, x in grids], (1, 1, kind.volume)
        self.layout = KvLayout.build(("text", "history", "current"), tuple(grids), tile)
        self.q_grid = BlockGrid(grids[-1], tile)
        self.scale = kind.dim**-0.5
        generator = torch.Generator(kind.device).manual_seed(0)

        def draw(tokens: int) -> Tensor:
            shape = (1, tokens, heads, kind.dim)
            drawn = torch.randn(shape, generator=generator, device=kind.device)
            return drawn.to(kind.dtype).transpose(1, 2)

        tokens = self.layout.segment_tokens
        self.q, self.k, self.v = draw(tokens[-1]), [*map(draw, tokens)], [*map(draw, tokens)]
        self.plan = plan_attention(
            self.q, self.k, self.layout, self.q_grid, budget=0.4, scale=self.scale,
            role="decode", sink_latents=0,
        )  # fmt: skip
        if not problem.known:
            self.plan = self.plan._replace(shared_segments=(), uniform=False)

    def compare(self, module: ModuleType, repeats: int) -> str:
        """Say how a provider errs, or nothing."""

        def attend() -> tuple[Tensor, Tensor]:
            out, lse = module.block_sparse_attention(
                self.q, self.k, self.v, self.plan, scale=self.scale, key_bias=None,
                return_lse=True,
            )  # fmt: skip
            return out, lse

        out, lse = attend()
        k, v, mask = torch.cat(self.k, 2), torch.cat(self.v, 2), self.plan.to_dense_mask()
        for head in range(out.shape[1]):
            q = self.q[0, head].float() * self.scale
            score = (q @ k[0, head].float().mT).masked_fill(~mask[0, head], -torch.inf)
            expected = score.softmax(-1) @ v[0, head].float()
            error = float((out[0, head].float() - expected).norm() / expected.norm())
            off = float((lse[0, head] - score.logsumexp(-1)).abs().max())
            if not (error < 1e-2 and off < 2e-2):
                return f"head {head} is off by {error:.2g}, its log-sum-exp by {off:.2g}"
        for turn in range(repeats):
            if not torch.equal(attend()[0], out):
                return f"call {turn + 2} of the same tensors gives another output"
        return ""


if __name__ == "__main__":
    sys.exit(main())
