"""Tell, inside a kernel, how many of the blocks that a row visits are of which segment."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visits_by_segment(ids, visits, a_blocks, b_blocks, c_blocks, CHOSEN: tl.constexpr):
    """Split the `visits` ids of a row among three segments of so many blocks.

    Blocks are numbered over the segments and ids ascend, so each segment has a run of them. Of
    segments that are not `CHOSEN` every block is visited, so nothing is counted where one is.
    """
    if CHOSEN[0] and (CHOSEN[1] or CHOSEN[2]):
        visits_a = _count_below(ids, visits, a_blocks)
    elif CHOSEN[0]:
        visits_a = visits - b_blocks - c_blocks
    else:
        visits_a = a_blocks
    if CHOSEN[1] and CHOSEN[2]:
        visits_b = _count_below(ids, visits, a_blocks + b_blocks) - visits_a
    elif CHOSEN[1]:
        visits_b = visits - visits_a - c_blocks
    else:
        visits_b = b_blocks
    return visits_a, visits_b, visits - visits_a - visits_b


@triton.jit
def _count_below(ids, visits, bound):
    """Count the ids of a row that are below a bound."""
    found = tl.zeros([128], tl.int32)
    for start in range(0, visits, 128):
        place = start + tl.arange(0, 128)
        found += (tl.load(ids + place, mask=place < visits, other=bound) < bound).to(tl.int32)
    return tl.sum(found, 0)
