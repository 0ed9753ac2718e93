"""Say how tokens fall into tiles and which tiles attend to which: the only place that knows.

Alphabet: `B` batch, `H` heads, `L` tokens (`Lq`, `Lk`), `D` head dim, `N` blocks (`Nq`, `Nk`),
`S` selected blocks, `T, Y, X` latent grid, `t, y, x` tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels.tile_order import Triple, latent_at_place, latents_of_runs, tiles_of_runs

ROLES = ("text", "history", "current")
CALL_ROLES = ("prefill", "self", "decode")
"""What a call does with the frames of its queries: it encodes a context, denoises all frames at
once, or denoises frames behind a history."""


@dataclass(frozen=True)
class BlockGrid:
    """Cut a latent grid of tokens, row-major over `(T, Y, X)`, into tiles of `(t, y, x)` tokens.

    Blocks are numbered row-major over `block_shape`, slots row-major inside a tile. Tiles at the
    end of an axis may hang over the grid; their slots outside it hold no token.
    """

    grid: Triple
    """Tokens along each axis `(T, Y, X)`; text of `L` tokens is `(1, 1, L)`."""
    tile: Triple
    """Slots of one tile along each axis `(t, y, x)`."""
    in_order: bool = False
    """Whether tokens lie tile by tile (`tile_order`); blocks are then runs of so many of them."""

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 0:
            raise ValueError(
                f"grid must be three token counts (T, Y, X), got {self.grid}; text is (1, 1, L)"
            )
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(
                f"tile must be three positive sizes (t, y, x), got {self.tile}; try (4, 4, 4)"
            )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Every table is looked up by its grid; hashing nested tuples anew took 0.1 ms a call.
        return hash((self.grid, self.tile, self.in_order))

    @functools.cached_property
    def laid(self) -> BlockGrid:
        """The same blocks of the tokens as they lie, which is all that kernels have to know."""
        if not self.in_order:
            return self
        return BlockGrid((1, 1, self.tokens), (1, 1, self.block_tokens))

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens that exist, `L`."""
        return math.prod(self.grid)

    @functools.cached_property
    def block_shape(self) -> Triple:
        """Tiles along each axis; all zero if the grid is empty."""
        if self.tokens == 0:
            return (0, 0, 0)
        if self.in_order:
            return self.laid.block_shape
        nt, ny, nx = (-(-size // step) for size, step in zip(self.grid, self.tile, strict=True))
        return (nt, ny, nx)

    @functools.cached_property
    def blocks(self) -> int:
        """Number of blocks, `N`."""
        return math.prod(self.block_shape)

    @functools.cached_property
    def block_tokens(self) -> int:
        """Slots of one block, existing or not."""
        return math.prod(self.tile)

    @functools.cached_property
    def is_full(self) -> bool:
        """Whether every slot of every block holds a token."""
        return self.blocks * self.block_tokens == self.tokens

    @functools.cached_property
    def is_row(self) -> bool:
        """Whether blocks are runs of tokens as they stand in the grid, as those of text are."""
        return self.grid[:2] == (1, 1) and self.tile[:2] == (1, 1)

    @functools.cached_property
    def latents_apart(self) -> bool:
        """Whether each block is of one latent."""
        per_latent = self.grid[1] * self.grid[2]
        return self.tile[0] == 1 and not (self.in_order and per_latent % self.block_tokens)

    def token_index(self, device: torch.device | str = "cpu") -> Tensor:
        """Token of each slot, `[N, block_tokens]` int64; `-1` marks slots outside the grid."""
        return _token_index(self.laid, torch.device(device))

    def valid(self, device: torch.device | str = "cpu") -> Tensor:
        """Whether a slot holds a token, `[N, block_tokens]` bool."""
        return _valid(self.laid, torch.device(device))

    def lengths(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens in each block, `[N]` int64."""
        return self.valid(device).sum(-1)

    def block_of_token(self, device: torch.device | str = "cpu") -> Tensor:
        """Block that holds each token, `[L]` int64."""
        return _block_of_token(self.laid, torch.device(device))

    def slot_of_token(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each token among all slots, `[L]` int64: `block * block_tokens + slot`."""
        return _slot_of_token(self.laid, torch.device(device))

    def neighbours(self) -> Tensor:
        """Whether two blocks are at most one tile apart (Manhattan), `[N, N]` bool on the host."""
        return _neighbours(self)

    def covers(self, finer: BlockGrid) -> Tensor:
        """Whether a block holds a block of a finer tiling of the same grid, `[N, N_finer]` bool.

        Raises:
            ValueError: if the tile is not a multiple of the finer tile.
        """
        return _covers(self, finer)

    def over_tokens(self, latents: Tensor) -> Tensor:
        """Give each token what its latent has, `[B, L]` from `[B, T]`."""
        if self.in_order:
            return latents[:, latent_at_place(self.grid, self.tile).to(latents.device)]
        return latents.repeat_interleave(self.tokens // max(self.grid[0], 1), 1)

    def first_latents(self, latents: int) -> Tensor:
        """Whether a block holds any of the first `latents` frames, `[N]` bool on the host."""
        if self.in_order:
            return latents_of_runs(self.grid, self.tile)[:, :latents].any(1)
        per_layer = max(math.prod(self.block_shape[1:]), 1)
        return torch.arange(self.blocks) // per_layer * self.tile[0] < latents

    def blocks_with(self, keep_frames: Tensor) -> Tensor:
        """Whether a block holds any kept frame, `[B, N]` bool from `keep_frames` `[B, T]`."""
        if self.in_order:
            runs = latents_of_runs(self.grid, self.tile).to(keep_frames.device)
            return (runs & keep_frames[:, None]).any(2)
        block_t, per_layer = self.block_shape[0], math.prod(self.block_shape[1:])
        pad = block_t * self.tile[0] - self.grid[0]
        frames = torch.nn.functional.pad(keep_frames, (0, pad), value=False)
        layers = frames.reshape(frames.shape[0], block_t, self.tile[0]).any(-1)
        return layers.repeat_interleave(per_layer, 1)


@dataclass(frozen=True)
class Segment:
    """Name a run of keys that shares one grid."""

    role: str
    """`"text"`, `"history"` or `"current"`."""
    grid: BlockGrid

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")


@dataclass(frozen=True)
class KvLayout:
    """Order the key segments; blocks are numbered over the segments and never span two."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        roles = [segment.role for segment in self.segments]
        if len(set(roles)) != len(roles):
            raise ValueError(f"each role may name one segment, got {roles}; join the others first")
        if len({segment.grid.block_tokens for segment in self.segments}) != 1:
            tiles = [segment.grid.tile for segment in self.segments]
            raise ValueError(
                f"all segments must have the same tile volume, got tiles {tiles}; "
                "build the layout with KvLayout.build"
            )

    @staticmethod
    def build(
        roles: tuple[str, ...],
        grids: tuple[Triple, ...],
        tile: Triple,
        in_order: tuple[str, ...] = (),
    ) -> KvLayout:
        """Tile each segment by `tile`, and text by as many tokens in a row.

        Tokens of the roles in `in_order` lie tile by tile.
        """
        if len(roles) != len(grids):
            raise ValueError(
                f"each key segment needs a role and a grid, got roles {roles} and grids {grids}"
            )
        text_tile = (1, 1, math.prod(tile))
        return KvLayout(
            tuple(
                Segment(
                    role, BlockGrid(grid, text_tile if role == "text" else tile, role in in_order)
                )
                for role, grid in zip(roles, grids, strict=True)
            )
        )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.segments)

    @functools.cached_property
    def laid(self) -> KvLayout:
        """The same blocks of the keys as they lie; see `BlockGrid.laid`."""
        if not any(part.grid.in_order for part in self.segments):
            return self
        return KvLayout(tuple(Segment(part.role, part.grid.laid) for part in self.segments))

    @functools.cached_property
    def in_runs(self) -> bool:
        """Whether every block is a run of tokens as they lie."""
        return all(segment.grid.laid.is_row for segment in self.segments)

    @functools.cached_property
    def tokens(self) -> int:
        """Keys over all segments, `Lk`."""
        return sum(segment.grid.tokens for segment in self.segments)

    @functools.cached_property
    def segment_tokens(self) -> list[int]:
        """Keys of each segment."""
        return [segment.grid.tokens for segment in self.segments]

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks over all segments, `Nk`."""
        return sum(segment.grid.blocks for segment in self.segments)

    @functools.cached_property
    def block_tokens(self) -> int:
        """Slots of one block, the same in every segment."""
        return self.segments[0].grid.block_tokens

    @functools.cached_property
    def is_full(self) -> bool:
        """Whether every slot of every block holds a token."""
        return all(segment.grid.is_full for segment in self.segments)

    def replace_grid(self, segment: int, grid: BlockGrid) -> KvLayout:
        """Give one segment another grid."""
        parts = list(self.segments)
        parts[segment] = Segment(parts[segment].role, grid)
        return KvLayout(tuple(parts))

    def candidate_segment(self, role: str) -> int | None:
        """Segment whose blocks are chosen: the history in decode, otherwise the current."""
        return self._by_role.get("history" if role == "decode" else "current")

    @functools.cached_property
    def _by_role(self) -> dict[str, int]:
        return {segment.role: n for n, segment in enumerate(self.segments)}

    def block_range(self, segment: int) -> range:
        """Block ids of a segment."""
        start = sum(other.grid.blocks for other in self.segments[:segment])
        return range(start, start + self.segments[segment].grid.blocks)

    def token_range(self, segment: int) -> range:
        """Key positions of a segment."""
        start = sum(other.grid.tokens for other in self.segments[:segment])
        return range(start, start + self.segments[segment].grid.tokens)

    def token_index(self, device: torch.device | str = "cpu") -> Tensor:
        """Key of each slot, `[Nk, block_tokens]` int64; `-1` marks slots without a token."""
        return _layout_token_index(self, torch.device(device))

    def block_of_token(self, device: torch.device | str = "cpu") -> Tensor:
        """Block that holds each key, `[Lk]` int64."""
        return _layout_block_of_token(self, torch.device(device))


@dataclass(frozen=True, eq=False)
class Order:
    """Say which query and which key of one segment stand at each place of a plan.

    The grids of queries and of that segment are then rows of places, `(1, 1, places)`.
    """

    queries: Tensor
    """Query at each place, each once, `[B, H, Lq]` int32."""
    keys: Tensor
    """Key of the segment at each place, none twice, `[B, H, places]` int32; others stay out."""
    segment: int
    """Number of the segment whose keys are sorted."""
    held: int
    """Keys of the segment, those that are left out among them."""


class BlockPlan(NamedTuple):
    """Say which key blocks each query block visits. Lives on the device; never read back."""

    indices: Tensor
    """Key blocks in ascending order, `[B, H, Nq, S]` int32; `-1` pads beyond `counts`."""
    counts: Tensor
    """How many of the `S` entries count, `[B, H, Nq]` int32."""
    q_grid: BlockGrid
    kv: KvLayout
    key_keep: Tensor | None = None
    """`[B, Lk]` bool; False masks a key inside a visited block (a dropped frame in its tile)."""
    uniform: bool = False
    """Whether the host knows that every count equals `S`."""
    shared_segments: tuple[int, ...] = ()
    """Segments that every query block is known to visit whole; kernels read no ids of theirs."""
    order: Order | None = None
    """Where queries and keys are sorted; by default they stand as they lie."""

    @property
    def segment_tokens(self) -> list[int]:
        """Keys of each segment, those that an order leaves out among them."""
        tokens = self.kv.segment_tokens
        if self.order is None:
            return tokens
        return [
            self.order.held if n == self.order.segment else length
            for n, length in enumerate(tokens)
        ]

    def visited(self) -> Tensor:
        """Whether a query block visits a key block, `[B, H, Nq, Nk]` bool. Not for hot loops."""
        device, blocks = self.indices.device, self.kv.blocks
        entry = torch.arange(self.indices.shape[-1], device=device)
        column = torch.where(entry < self.counts[..., None], self.indices.long(), blocks)
        visited = torch.zeros(*self.indices.shape[:3], blocks + 1, dtype=torch.bool, device=device)
        return visited.scatter(-1, column, True)[..., :blocks]

    def keys_of(self, blocks: Tensor) -> Tensor:
        """Keys that are seen from query blocks `[N]`, `[B, H, N, Lk]` bool. Not for hot loops."""
        seen = self.visited()[:, :, blocks][..., self.kv.block_of_token(self.indices.device)]
        if self.order is not None:
            parts = list(seen.split([part.grid.tokens for part in self.kv.segments], -1))
            part = parts[self.order.segment]
            at = self.order.keys.long()[:, :, None].expand_as(part)
            whole = part.new_zeros(*part.shape[:3], self.order.held)
            parts[self.order.segment] = whole.scatter(-1, at, part)
            seen = torch.cat(parts, -1)
        return seen if self.key_keep is None else seen & self.key_keep[:, None, None]

    def to_dense_mask(self) -> Tensor:
        """Element mask that dense attention would need, `[B, H, Lq, Lk]` bool. For tests."""
        mask = self.keys_of(self.q_grid.block_of_token(self.indices.device))
        if self.order is None:
            return mask
        return mask.scatter(2, self.order.queries.long()[..., None].expand_as(mask), mask)

    def density(self) -> Tensor:
        """Share of block pairs that are visited, a 0-d tensor on the device."""
        return self.counts.float().mean() / max(self.kv.blocks, 1)


# Tables outlive the call that asks first, so they must not be inference tensors: those could not
# be used where a gradient is recorded.
@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _token_index(grid: BlockGrid, device: torch.device) -> Tensor:
    (size_t, size_y, size_x), (tile_t, tile_y, tile_x) = grid.grid, grid.tile
    block_t, block_y, block_x = grid.block_shape
    at_t = torch.arange(block_t * tile_t, device=device).view(block_t, 1, 1, tile_t, 1, 1)
    at_y = torch.arange(block_y * tile_y, device=device).view(1, block_y, 1, 1, tile_y, 1)
    at_x = torch.arange(block_x * tile_x, device=device).view(1, 1, block_x, 1, 1, tile_x)
    token = (at_t * size_y + at_y) * size_x + at_x
    inside = (at_t < size_t) & (at_y < size_y) & (at_x < size_x)
    return torch.where(inside, token, -1).reshape(grid.blocks, grid.block_tokens)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _valid(grid: BlockGrid, device: torch.device) -> Tensor:
    return _token_index(grid, device) >= 0


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _slot_of_token(grid: BlockGrid, device: torch.device) -> Tensor:
    index = _token_index(grid, device).flatten()
    slot = torch.arange(index.numel(), device=device)
    # Slots without a token write to one place past the end, which is cut off.
    target = torch.where(index < 0, grid.tokens, index)
    return torch.empty(grid.tokens + 1, dtype=torch.int64, device=device).scatter(0, target, slot)[
        : grid.tokens
    ]


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _block_of_token(grid: BlockGrid, device: torch.device) -> Tensor:
    return _slot_of_token(grid, device) // grid.block_tokens


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _neighbours(grid: BlockGrid) -> Tensor:
    if grid.in_order:
        position = tiles_of_runs(grid.grid, grid.tile)
    else:
        axes = [torch.arange(size) for size in grid.block_shape]
        position = torch.cartesian_prod(*axes) if grid.blocks else torch.zeros(0, 3)
    return (position[:, None] - position[None]).abs().sum(-1) <= 1


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _covers(grid: BlockGrid, finer: BlockGrid) -> Tensor:
    if grid.grid != finer.grid or any(a % b for a, b in zip(grid.tile, finer.tile, strict=True)):
        raise ValueError(
            f"the query tile must be a multiple of the key tile on one grid, got {grid.tile} on "
            f"{grid.grid} and {finer.tile} on {finer.grid}; use (4, 8, 8) over (1, 8, 8)"
        )
    # Slot 0 of a block always holds a token.
    owner = grid.block_of_token()[finer.token_index()[:, 0]]
    return torch.arange(grid.blocks)[:, None] == owner


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _layout_token_index(layout: KvLayout, device: torch.device) -> Tensor:
    parts = []
    for number, segment in enumerate(layout.segments):
        index = segment.grid.token_index(device)
        parts.append(torch.where(index < 0, -1, index + layout.token_range(number).start))
    return torch.cat(parts)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _layout_block_of_token(layout: KvLayout, device: torch.device) -> Tensor:
    return torch.cat(
        [
            segment.grid.block_of_token(device) + layout.block_range(number).start
            for number, segment in enumerate(layout.segments)
        ]
    )
