"""Split attention over ranks by heads: each computes its own, and all get the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipass.parallel.ranks import Group, gathered, ranks_of


def over_heads(attend: Callable[..., Any], *tensors: Tensor, group: Group = None) -> Any:
    """Attend with a share of the heads on each rank, and put the results together on all.

    Heads do not see each other, so what is chosen for a head, blocks for instance, is what one
    process would choose. All ranks call it with the same tensors, in the same order of calls.
    In a compiled model the call inside stays a site that passes know; join pieces of keys in
    `attend` rather than in front of it, so that they can be told apart::

        out = over_heads(F.scaled_dot_product_attention, q, k, v)

    Args:
        attend: is called with the shares of `tensors`, and returns a tensor or a tuple of tensors
            with heads in dimension 1, such as `[B, H, Lq, D]` and `[B, H, Lq]`.
        tensors: `[B, H, ...]`. Tensors with fewer heads, a divisor of H, are those of groups.
        group: the ranks that share; all by default.

    Returns:
        What `attend(*tensors)` would.

    Raises:
        ValueError: tensors whose heads do not fit together.
        LipassError: `torch.distributed` has not begun, or this process is not in the group.
    """
    rank, count = ranks_of(group)
    if count == 1:
        return attend(*tensors)
    heads = max([0, *[one.shape[1] for one in tensors if one.dim() > 1]])
    if not heads or any([one.dim() < 2 or heads % one.shape[1] != 0 for one in tensors]):
        raise ValueError(
            f"tensors must have heads in dimension 1, as many as the others or a divisor, got "
            f"shapes {[tuple(one.shape) for one in tensors]}; capture what has none in `attend`"
        )
    own = -(-heads // count)
    starts = [min(one * own, heads - own) for one in range(count)]
    found = attend(*(_share(one, heads, starts[rank], own) for one in tensors))
    if isinstance(found, tuple | list):
        return type(found)([_whole(one, starts, own, group) for one in found])
    return _whole(found, starts, own, group)


def _share(tensor: Tensor, heads: int, start: int, own: int) -> Tensor:
    """Take the heads of a rank; those of groups are repeated where a share cuts a group."""
    per_head = heads // tensor.shape[1]
    if start % per_head or own % per_head:
        tensor, per_head = tensor.repeat_interleave(per_head, 1), 1
    return tensor.narrow(1, start // per_head, own // per_head)


def _whole(part: Tensor, starts: list[int], own: int, group: Group) -> Tensor:
    """Join the shares of all ranks; the last ones may overlap.

    In memory tokens come first, `[B, Lq, H, D]`, as the output projection reads them.
    """
    if part.dim() < 2 or part.shape[1] != own:
        raise ValueError(
            f"attend must return heads in dimension 1, {own} of them, got shape "
            f"{tuple(part.shape)}; transpose what it returns"
        )
    shares = gathered(part.movedim(1, -2 if part.dim() > 3 else -1), len(starts), group)
    pieces = []
    for rank, start in enumerate(starts):
        first = rank * own - start
        if first < own:
            heads = shares[rank].movedim(-2 if part.dim() > 3 else -1, 1)
            pieces.append(heads.narrow(1, first, own - first))
    if part.dim() <= 3:
        return torch.cat(pieces, 1)
    return torch.cat([one.movedim(1, -2) for one in pieces], -2).movedim(-2, 1)
