"""Sort tokens into blocks by halving them along their widest axis, on any device."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def sort_by_halves(at: Tensor, first: int, block: int) -> Tensor:
    """Return which token stands at each place, `[B, H, first + N]` int32.

    All heads are cut at the same places, so a level is a few sorts, whatever it holds.

    Args:
        at: coordinates of the tokens behind the first `[B, H, N, axes]` fp32.
        first: tokens that stay in front as they lie.
        block: places of a block.
    """
    batch, heads, free, axes = at.shape
    order = torch.arange(free, device=at.device).expand(batch, heads, free).contiguous()
    for bounds in levels(first, free, block):
        sizes = torch.tensor(bounds[1:], device=at.device) - torch.tensor(
            bounds[:-1], device=at.device
        )
        part = torch.arange(len(sizes), device=at.device).repeat_interleave(
            sizes, output_size=free
        )
        order = (part * free + order).sort(-1).values % max(free, 1)
        here = at.gather(2, order[..., None].expand(-1, -1, -1, axes))
        total, squares = (
            here.new_zeros(batch, heads, len(sizes), axes).index_add_(2, part, x)
            for x in (here, here * here)
        )
        spread = squares - total * total / sizes[:, None]
        axis = spread.argmax(-1)[..., part]
        value = here.gather(3, axis[..., None])[..., 0]
        by_value = value.argsort(dim=-1, stable=True)
        by_part = part[by_value].argsort(dim=-1, stable=True)
        order = order.gather(2, by_value.gather(2, by_part))
    front = torch.arange(first, device=at.device).expand(batch, heads, first)
    return torch.cat([front, _ascending(order, first, block) + first], 2).int()


def _ascending(order: Tensor, first: int, block: int) -> Tensor:
    """Sort each block by its tokens: what is read together then lies as near as it can."""
    free = order.shape[2]
    part = (torch.arange(free, device=order.device) + first) // block
    return (part * free + order).sort(-1).values % max(free, 1)


@functools.lru_cache(maxsize=512)
def levels(first: int, free: int, block: int) -> tuple[tuple[int, ...], ...]:
    """Return the bounds of the parts that each level halves, counted from `first`.

    A part is halved at a multiple of `block`, counted from the first place of all; those of one
    block stay.
    """
    found: list[tuple[int, ...]] = []
    bounds = [first, first + free]
    while free:
        cuts = [first]
        for begin, end in itertools.pairwise(bounds):
            before = begin // block
            blocks = -(-end // block) - before
            cuts += [(before + blocks // 2) * block, end] if blocks > 1 else [end]
        if cuts == bounds:
            return tuple(found)
        found.append(tuple(bound - first for bound in bounds))
        bounds = cuts
    return ()
