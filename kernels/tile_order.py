"""Order the tokens of a latent grid tile by tile, so that a block is a run of tokens.

Tokens of one tile lie together, row-major inside it, and tiles come row-major. Blocks are then
runs of as many tokens as a tile has slots: where tiles divide the grid, each run is a tile, and
where they do not, a run goes on in the next tile in place of being short.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

Triple = tuple[int, int, int]


# Tables outlive the call that asks first, so they must not be inference tensors.
@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def token_at_place(grid: Triple, tile: Triple) -> Tensor:
    """Return the token, row-major over `(T, Y, X)`, at each place of the order, `[L]` int64."""
    t, y, x = _tiles(grid, tile).unbind(1)
    _, ny, nx = (-(-size // step) for size, step in zip(grid, tile, strict=True))
    return ((t * ny + y) * nx + x).sort(stable=True).indices


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def place_of_token(grid: Triple, tile: Triple) -> Tensor:
    """Return the place of each token, `[L]` int64: the way back."""
    return token_at_place(grid, tile).argsort()


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def latent_at_place(grid: Triple, tile: Triple) -> Tensor:
    """Return the latent of the token at each place, `[L]` int64."""
    return token_at_place(grid, tile) // max(grid[1] * grid[2], 1)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def latents_of_runs(grid: Triple, tile: Triple) -> Tensor:
    """Say whether a run holds tokens of a latent, `[N, T]` bool."""
    run = torch.arange(math.prod(grid)) // math.prod(tile)
    found = torch.zeros(-(-math.prod(grid) // math.prod(tile)), grid[0], dtype=torch.bool)
    found[run, latent_at_place(grid, tile)] = True
    return found


def tiles_of_runs(grid: Triple, tile: Triple) -> Tensor:
    """Return the tile `(t, y, x)` that a run is taken for, that of its middle, `[N, 3]` int64."""
    tokens, slots = math.prod(grid), math.prod(tile)
    middle = (torch.arange(0, tokens, slots) + slots // 2).clamp(max=tokens - 1)
    return _tiles(grid, tile)[token_at_place(grid, tile)[middle]]


def _tiles(grid: Triple, tile: Triple) -> Tensor:
    """Return the tile of each token, `[L, 3]` int64."""
    axes = [torch.arange(size) // step for size, step in zip(grid, tile, strict=True)]
    return torch.cartesian_prod(*axes).view(-1, 3)


_library = torch.library.Library("lipass", "FRAGMENT")
_library.define("tile_order(SymInt[] grid, int[] tile, bool back, Device device) -> Tensor")


def _tile_order(grid: list[int], tile: list[int], back: bool, device: torch.device) -> Tensor:
    """Give the index by which `index_select` puts tokens in tile order, or `back`, `[L]` int64."""
    t, y, x = grid
    table = place_of_token if back else token_at_place
    # a copy: the compiler may write other results to memory that nobody reads any more
    found = table((t, y, x), (tile[0], tile[1], tile[2]))
    return found.to(device, non_blocking=True, copy=True)


def _tile_order_fake(grid: list[int], tile: list[int], back: bool, device: torch.device) -> Tensor:
    t, y, x = grid
    return torch.empty(t * y * x, dtype=torch.int64, device=device)


_library.impl("tile_order", _tile_order, "CompositeExplicitAutograd")
torch.library.register_fake("lipass::tile_order", _tile_order_fake, lib=_library)
