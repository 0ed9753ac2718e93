"""Time a chunk through a stack of blocks of a released model's widths, under each preset.

`python -m benchmarks.gpu.blocks hy-worldplay --out FILE`. Tokens are those of the release, weights
are random; `counted` says what all layers of the model would take, its codec and text left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import lipass
from benchmarks.gpu.part import Part
from benchmarks.real_models.blocks import Block, Trial
from benchmarks.real_models.families import FAMILIES, Family
from benchmarks.real_models.rows import PRESETS, options_of
from lipass.kernels import registry

_LAYERS = 8
_DRY_GRID = (4, 8)
# What the first chunk of a preset may take: it compiles.
_COMPILE_S = 20.0


class Stack(nn.Module):
    """Blocks one after the other, each with keys and values of its own."""

    def __init__(self, family: Family, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(family) for _ in range(layers))

    def forward(
        self, x: Tensor, level: Tensor, text: Tensor, rays: Tensor,
        past: list[tuple[Tensor, Tensor]] | None = None, encode: bool = False,
    ) -> Any:  # fmt: skip
        """Return the latents, or the keys and values of each block."""
        kept = []
        for number, block in enumerate(self.blocks):
            held = None if past is None else past[number]
            if encode:
                kept.append(block(x, level, text, rays, None, True))
            x = block(x, level, text, rays, held)
        return kept if encode else x


def main(argv: list[str] | None = None) -> int:
    """Write a row for each preset."""
    part = Part(argv)
    family = next(one for one in FAMILIES if one.name == part.name)
    layers, grid = _LAYERS, family.latent_grid
    if part.dry:
        layers, grid = 1, _DRY_GRID
        family = Family(**{**vars(family), "width": 64, "heads": 2, "head_dim": 32,
                           "token_weights": 20 * 64**2, "row_weights": 6 * 64**2,
                           "kept_weights": 0})  # fmt: skip
    torch.manual_seed(0)
    with torch.device(part.device):
        stack = Stack(family, layers).to(part.dtype).eval().requires_grad_(False)
    trial = Trial(family, grid, part.dtype, part.device, layers)
    part.note(family=family.name, layers=layers, grid=[trial.history + trial.new, *grid])
    off, failed = 0.0, False
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for preset in PRESETS:
            if part.left_s < _COMPILE_S and not part.dry:
                part.row(preset=preset, left_out="no time was left")
                continue
            try:
                row = _run(part, trial, stack, preset)
            except Exception as error:  # the others say something without it
                failed = True
                part.row(preset=preset, failed=f"{type(error).__name__}: {error}"[:500])
                continue
            off = off or row.get("ms", 0.0)
            part.row(preset=preset, **({"speed": off / row["ms"]} if off else {}), **row)
    return int(failed)


def _run(part: Part, trial: Trial, stack: Stack, preset: str) -> dict[str, Any]:
    """Compile under a preset and time chunks; where it only warms up, the first alone."""
    options = options_of(preset, trial.family)
    if lipass.Config.resolve(None, options).steps is not None:
        options["chunk_latents"] = trial.new
    inner = "eager" if part.dry else "inductor"
    fast = torch.compile(stack, backend="light_interaction", options={**options, "inner": inner})
    if part.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    trial.chunk(fast, options)
    part.wait()
    first_s, times = time.perf_counter() - begin, []
    if part.warm:
        return {"first_s": first_s}
    registry.reset_telemetry()
    for _ in range(1 if part.dry else 3):
        begin = time.perf_counter()
        chunk = trial.chunk(fast, options)
        part.wait()
        times.append(1e3 * (time.perf_counter() - begin))
    ms = statistics.median(times)
    return {
        "ms": ms,
        "counted_s": ms * trial.family.layers / len(stack.blocks) / 1e3,
        "first_s": first_s,
        "context_latents": trial.read(chunk),
        "steps": trial.steps - chunk.steps_skipped(),
        "ran": _ran(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if not part.dry else None,
    }


def _ran() -> dict[str, int]:
    """Count the calls of attention by what ran, with the reason where that is dense."""
    found: dict[str, int] = {}
    for counts in registry.telemetry().values():
        what = f"{counts.provider}: {counts.reason}" if counts.dense_calls else counts.provider
        found[what] = found.get(what, 0) + counts.calls
    return found


if __name__ == "__main__":
    sys.exit(main())
