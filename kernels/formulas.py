"""Count the FLOPs and bytes of each form of attention, as expressions over the sizes of a call.

```text
flops = 4 * rows * q_slots * visited
bytes = number_bytes * rows * (2 * copied + pooled)

          q_slots           visited   copied                           pooled
joined    Lq                Lk        Lk                               -
apart     Lq and idle lanes Lk        -                                -
sparse    Lq and idle lanes Lv        what its provider cannot read    Lq + Lk
                                      where it lies
```
"""

from __future__ import annotations

import functools
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
    """
    if form == "joined":
        copied = layout.tokens if len(layout.segments) > 1 else 0
        sizes = Sizes(rows, number_bytes, q_grid.tokens, layout.tokens, copied, 0)
    elif form == "apart":
        slots = _with_idle_lanes(q_grid.tokens)
        sizes = Sizes(rows, number_bytes, slots, layout.tokens, 0, 0)
    else:
        visited = min(visited_blocks * layout.block_tokens, layout.tokens)
        slots, copied = q_grid.block_tokens, q_grid.blocks * visited
        if compiled:
            slots = _with_idle_lanes(slots)
            copied = 0 if _lies_in_runs(layout) else min(copied, layout.tokens)
        pooled = q_grid.tokens + layout.tokens
        sizes = Sizes(rows, number_bytes, q_grid.blocks * slots, visited, copied, pooled)
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


def _lies_in_runs(layout: KvLayout) -> bool:
    """Whether each block is one run of rows, which the compiled kernel reads where it lies."""
    for segment in layout.segments:
        (_, size_y, size_x), (tile_t, tile_y, tile_x) = segment.grid.grid, segment.grid.tile
        rows_whole = tile_x >= size_x or (tile_t == 1 and tile_y == 1)
        if not rows_whole or not (tile_y >= size_y or tile_t == 1):
            return False
    return True
