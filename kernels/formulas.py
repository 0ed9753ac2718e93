"""Count the FLOPs and bytes of each form of attention, as expressions over the sizes of a call.

```text
flops = 4 * rows * q_slots * visited
bytes = number_bytes * rows * (2 * copied + pooled)

          q_slots           visited   copied                           pooled
joined    Lq                Lk        Lk                               -
on a GPU  slots, in waves   slots     -                                Lq + Lk
apart     Lq and idle lanes Lk        Lk, as tiles of the kernel       -
sparse    Lq and idle lanes Lv        what its provider cannot read    Lq + Lk
                                      where it lies
```

Blocks at the end of an axis hold fewer tokens than a tile. The compiled kernel skips what they
lack, so a visited block counts with the mean of all; gathering copies whole tiles.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lipass.kernels.plan import BlockGrid, KvLayout

# The compiled kernel computes this many queries at a time, idle lanes included.
_LANES = 32


class Sizes(NamedTuple):
    """The sizes that the work of a call depends on; also the symbols of the expressions."""

    rows: Any
    """`B * H * D`: numbers of one token over all heads."""
    number_bytes: Any
    q_slots: Any
    """Queries that are computed."""
    visited: Any
    """Keys that each query visits, `Lv`."""
    copied: Any
    """Keys that are copied first, counted as often as they are."""
    pooled: Any
    """Tokens that are averaged to choose blocks."""


def work_of(
    rows: int,
    number_bytes: int,
    layout: KvLayout,
    q_grid: BlockGrid,
    form: str,
    visited_blocks: int,
    compiled: bool,
    gpu: tuple[int, int] | None = None,
) -> tuple[float, float]:
    """Count FLOPs and bytes of a call.

    Args:
        rows: `B * H * D`.
        number_bytes: bytes of a number.
        layout: the key segments.
        q_grid: grid of the queries.
        form: `joined`, `apart` or `sparse`.
        visited_blocks: blocks that each query block visits; read for `sparse` only.
        compiled: whether `sparse` is the compiled kernel or gathers.
        gpu: programs of the kernel and processors of the GPU that runs it; None is a CPU.
    """
    if form == "joined":
        copied = layout.tokens if len(layout.segments) > 1 else 0
        sizes = Sizes(rows, number_bytes, q_grid.tokens, layout.tokens, copied, 0)
    elif form == "apart":
        slots = _with_idle_lanes(q_grid.tokens)
        sizes = Sizes(rows, number_bytes, slots, layout.tokens, layout.tokens, 0)
    else:
        pooled = q_grid.tokens + layout.tokens
        if gpu is not None:
            # Whole tiles are computed, slots without a token too, and read where they lie; the
            # last wave of programs takes as long as a full one.
            programs, processors = gpu
            waves = -(-programs // processors) * processors / max(programs, 1)
            visited, copied = visited_blocks * layout.block_tokens, 0
            slots = round(q_grid.blocks * q_grid.block_tokens * waves)
        elif compiled:
            visited = visited_blocks * layout.tokens // layout.blocks
            slots = sum(n * _with_idle_lanes(tokens) for tokens, n in _block_sizes(q_grid))
            copied = 0 if _lies_in_runs(layout) else min(q_grid.blocks * visited, layout.tokens)
        else:
            visited = min(visited_blocks * layout.block_tokens, layout.tokens)
            slots = q_grid.blocks * q_grid.block_tokens
            copied = q_grid.blocks * visited
        sizes = Sizes(rows, number_bytes, slots, visited, copied, pooled)
    flops, moved = _counters()
    return float(flops(*sizes)), float(moved(*sizes))


def expressions() -> tuple[Any, Any]:
    """Return FLOPs and bytes as sympy expressions in the fields of `Sizes`."""
    import sympy

    s = Sizes(*sympy.symbols(Sizes._fields, integer=True, nonnegative=True))
    return 4 * s.rows * s.q_slots * s.visited, s.number_bytes * s.rows * (2 * s.copied + s.pooled)


@functools.lru_cache(maxsize=1)
def _counters() -> tuple[Callable[..., float], Callable[..., float]]:
    """Turn the expressions into functions of numbers."""
    import sympy

    flops, moved = (sympy.lambdify(Sizes._fields, one) for one in expressions())
    return flops, moved


def _with_idle_lanes(queries: int) -> int:
    return -(-queries // _LANES) * _LANES


def _block_sizes(grid: BlockGrid) -> list[tuple[int, int]]:
    """Say how many tokens blocks hold, and how many blocks hold as many."""
    axes = []
    for size, step in zip(grid.grid, grid.tile, strict=True):
        whole, rest = divmod(size, step)
        axes.append([(step, whole), (rest, 1 if rest else 0)])
    kinds = itertools.product(*axes)
    return [(math.prod(n for n, _ in kind), math.prod(n for _, n in kind)) for kind in kinds]


def _lies_in_runs(layout: KvLayout) -> bool:
    """Whether each block is one run of rows, which the compiled kernel reads where it lies."""
    for segment in layout.segments:
        (_, size_y, size_x), (tile_t, tile_y, tile_x) = segment.grid.grid, segment.grid.tile
        rows_whole = tile_x >= size_x or (tile_t == 1 and tile_y == 1)
        if not rows_whole or not (tile_y >= size_y or tile_t == 1):
            return False
    return True
