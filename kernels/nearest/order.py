"""Sort the keys of a history into blocks of like direction, and register that as operators.

What depends on the keys alone is asked for in front of the call that attends, so that it can be
made once a chunk: directions, an order, and the means of its blocks. Keys stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.block_sparse import native
from lipass.kernels.block_sparse.in_order import rows_at
from lipass.kernels.nearest.basis import AXES_MAX, along, basis_of
from lipass.kernels.nearest.halves import sort_by_halves
from lipass.kernels.plan import BlockGrid
from lipass.kernels.pool.api import pool_blocks

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define("key_basis(Tensor keys, int axes, int seed, int first) -> Tensor")
_library.define("key_order(Tensor keys, Tensor basis, int first, int block) -> Tensor")
_library.define("pool_in_order(Tensor keys, Tensor order, int block) -> Tensor")


def sort_keys(keys: Tensor, basis: Tensor, first: int, block: int) -> Tensor:
    """Return which key stands at each place, `[B, H, L]` int32.

    Keys are halved again and again, each time across the axis along which they differ most, until
    a part is one block: the median is the plane, so that all blocks are full.

    Args:
        keys: `[B, H, L, D]`.
        basis: main directions of the keys `[B, H, D, axes]`, as `key_basis` gives them.
        first: keys that stay in front as they lie, such as those of sink latents.
        block: places of a block.

    Raises:
        ValueError: for a number of first keys or a block that cannot be.
    """
    if first < 0 or block < 1:
        raise ValueError(
            f"first must be >= 0 and block >= 1, got {first} and {block}; use 0 for no sink and "
            "the tokens of a tile"
        )
    first = min(first, keys.shape[2])
    # Of unit length: an axis is then as wide as keys differ along it.
    unit = torch.nn.functional.normalize(basis, dim=2)
    free = keys[:, :, first:].float()
    return _sorted(free - free.mean(2, keepdim=True), unit, first, block)


def sort_queries(q: Tensor, basis: Tensor, block: int) -> Tensor:
    """Return which query stands at each place, `[B, H, L]` int32.

    An axis is as wide as the scores of queries differ by the keys along it: the basis has the
    length that keys have.
    """
    return _sorted(q, basis, 0, block)


def _sorted(x: Tensor, basis: Tensor, first: int, block: int) -> Tensor:
    at = along(x, basis)
    if x.device.type == "cpu" and native.why_not_loaded() is None:
        order: Tensor = torch.ops.lipass_native.sort_by_halves(at, first, block)
        return order
    return sort_by_halves(at, first, block)


def pool_in_order(x: Tensor, order: Tensor, block: int) -> Tensor:
    """Average blocks of so many places, `[B, H, N, D]` fp32.

    Args:
        x: tokens `[B, H, L, D]`.
        order: which of them stands at each place `[B, H, places]` int32.
        block: places of a block; the last one may have fewer.
    """
    grid = BlockGrid((order.shape[2], 1, 1), (block, 1, 1))
    return pool_blocks(rows_at(x, order), grid)


def among_frames(order: Tensor, grid: BlockGrid, keep: Tensor) -> Tensor:
    """Take frames out of an order, and number the keys that stay among themselves.

    Args:
        order: `[B, H, L]` int32 over the keys of a grid.
        grid: of these keys.
        keep: which frames stay `[T]` bool, on the host.
    """
    tokens = keep.to(order.device).repeat_interleave(grid.tokens // max(grid.grid[0], 1))
    place = (tokens.cumsum(0) - 1).int()
    return place[order[tokens[order.long()]].long()].view(*order.shape[:2], -1)


def check_axes(axes: int) -> None:
    """Check a number of directions.

    Raises:
        ValueError: if it is out of range.
    """
    if not 1 <= axes <= AXES_MAX:
        raise ValueError(f"axes must be in [1, {AXES_MAX}], got {axes}; use 8")


def _key_basis(keys: Tensor, axes: int, seed: int, first: int) -> Tensor:
    check_axes(axes)
    return basis_of(keys, axes, seed, first)


def _key_basis_fake(keys: Tensor, axes: int, seed: int, first: int) -> Tensor:
    batch, heads, _, dim = keys.shape
    return keys.new_empty(batch, heads, dim, min(axes, dim), dtype=torch.float32)


def _key_order_fake(keys: Tensor, basis: Tensor, first: int, block: int) -> Tensor:
    return keys.new_empty(keys.shape[:3], dtype=torch.int32)


def _pool_in_order_fake(keys: Tensor, order: Tensor, block: int) -> Tensor:
    blocks = (order.shape[2] + block - 1) // block
    return keys.new_empty(*keys.shape[:2], blocks, keys.shape[3], dtype=torch.float32)


for _name, _real, _fake in (
    ("key_basis", _key_basis, _key_basis_fake),
    ("key_order", sort_keys, _key_order_fake),
    ("pool_in_order", pool_in_order, _pool_in_order_fake),
):
    _library.impl(_name, in_given_dtypes(_real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lipass::{_name}", _fake, lib=_library)
