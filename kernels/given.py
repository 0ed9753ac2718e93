"""Take a choice of blocks that the caller has made, as planner `"given"` does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout


class GivenBlocks(NamedTuple):
    """Say which key blocks each query block visits, numbered over the segments."""

    blocks: Tensor
    """`[B or 1, H or 1, Nq, S]` ints, ascending in each row as far as they count."""
    counts: Tensor | None
    """`[B or 1, H or 1, Nq]` ints; None is `S` everywhere."""


def plan_as_given(given: GivenBlocks, q: Tensor, layout: KvLayout, q_grid: BlockGrid) -> BlockPlan:
    """Make a plan of given blocks that `unfit_blocks` has nothing to say about."""
    shape = (*q.shape[:2], q_grid.blocks)
    indices = given.blocks.to(torch.int32).expand(*shape, -1).contiguous()
    if given.counts is None:
        counts = torch.full(shape, indices.shape[3], dtype=torch.int32, device=q.device)
    else:
        counts = given.counts.to(torch.int32).expand(shape).contiguous()
    return BlockPlan(indices, counts, q_grid.laid, layout.laid, uniform=given.counts is None)


def unfit_blocks(given: GivenBlocks, q: Tensor, layout: KvLayout, q_grid: BlockGrid) -> str | None:
    """Say how given blocks do not fit a call, or return None.

    Their numbers are read where that is free, on the CPU: a kernel would follow a wrong one out of
    the keys, and count a key twice.
    """
    rows = (*q.shape[:2], q_grid.blocks)
    why = _unfit_ids("blocks", given.blocks, 4, q, rows)
    if why is None and given.counts is not None:
        why = _unfit_ids("block_counts", given.counts, 3, q, rows)
    if why is not None or q.device.type != "cpu":
        return why
    return _unfit_numbers(given, layout.blocks)


def _unfit_ids(name: str, ids: Tensor, axes: int, q: Tensor, rows: tuple[int, ...]) -> str | None:
    """Check rows, dtype and device of what has one entry for each row of a plan."""
    fits = ids.dim() == axes and ids.shape[2] == rows[2]
    if not (fits and ids.shape[0] in (1, rows[0]) and ids.shape[1] in (1, rows[1])):
        size = f"[B or 1, H or 1, Nq{', S' if axes == 4 else ''}]"
        return (
            f"{name} must be {size} with B, H, Nq = {rows}, got {list(ids.shape)}; give "
            "each block of queries a row"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        return f"{name} must be int32 or int64, got {ids.dtype}; convert them"
    if ids.device != q.device:
        return f"{name} must be on the device of q, {q.device}, got {ids.device}; move them"
    return None


def _unfit_numbers(given: GivenBlocks, key_blocks: int) -> str | None:
    width = given.blocks.shape[3]
    counts = given.blocks.new_tensor(width) if given.counts is None else given.counts
    if not bool(((counts >= 0) & (counts <= width)).all()):
        return (
            f"block_counts must be in [0, {width}], the length of a row, got "
            f"{int(counts.min())} to {int(counts.max())}; count the blocks of each row"
        )
    beyond = torch.arange(width) >= counts[..., None]
    inside = (given.blocks >= 0) & (given.blocks < key_blocks)
    if not bool((inside | beyond).all()):
        return (
            f"blocks must be numbered from 0 to {key_blocks - 1} over the segments, got some "
            "outside; number them with KvLayout.block_range"
        )
    ascends = given.blocks[..., 1:] > given.blocks[..., :-1]
    if not bool((ascends | beyond[..., 1:]).all()):
        return "blocks must ascend in each row, got one that does not; sort them, each block once"
    return None
