"""Register `lipass::sparse_attention`: pool, select and attend behind one operator.

One boundary a call site. The operator is opaque to the inner compiler and has no state of its own;
what it decided is counted in `lipass.kernels.registry`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipass.kernels import registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.call import Call, resolve_layout, triple
from lipass.kernels.given import GivenBlocks
from lipass.kernels.nearest.plan import Buckets
from lipass.kernels.plan import BlockGrid
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.sparse import attend
from lipass.kernels.steered import added
from lipass.kernels.token_major import empty_token_major

_ARGUMENTS = (
    "(Tensor q, Tensor[] k, Tensor[] v, SymInt[] q_grid, SymInt[] kv_grids, "
    "str roles, int[] tile, float budget, float scale, int sink_latents, str role, "
    "Tensor? keep_frames, str site, *, Tensor? history_means=None, Tensor? key_bias=None, "
    "str planner='mean', Tensor? blocks=None, Tensor? block_counts=None, "
    "Tensor? latent_mask=None, Tensor? history_order=None, Tensor? history_basis=None, "
    "str tile_order='')"
)
_library = torch.library.Library("lipass", "FRAGMENT")
_library.define(f"sparse_attention{_ARGUMENTS} -> Tensor")
_library.define(f"sparse_attention_lse{_ARGUMENTS} -> (Tensor, Tensor)")
_library.define("pool_blocks(Tensor x, SymInt[] grid, int[] tile) -> Tensor")


def _call(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_grid: list[int],
    kv_grids: list[int],
    roles: str,
    tile: list[int],
    budget: float,
    scale: float,
    sink_latents: int,
    role: str,
    keep_frames: Tensor | None,
    site: str,
    *,
    history_means: Tensor | None = None,
    key_bias: Tensor | None = None,
    planner: str = "mean",
    blocks: Tensor | None = None,
    block_counts: Tensor | None = None,
    latent_mask: Tensor | None = None,
    history_order: Tensor | None = None,
    history_basis: Tensor | None = None,
    tile_order: str = "",
) -> Call:
    """Resolve the arguments of both operators.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys `[B, H, L, D]`, one tensor per segment.
        v: values like `k`.
        q_grid: `(T, Y, X)` of the queries.
        kv_grids: `(T, Y, X)` of each segment, flattened; text of `L` tokens is `(1, 1, L)`.
        roles: role of each segment, comma separated: text, history, current.
        tile: `(t, y, x)`, tokens of a block along each axis. Three more numbers give the queries
            a tile of their own, in prefill a multiple of the first: fewer, larger query blocks
            choose more coarsely and copy less.
        budget: share of the unprotected candidate blocks to visit; 1.0 is dense attention.
        scale: softmax scale.
        sink_latents: how many of the first candidate frames are always visited.
        role: `"decode"` (candidates are the blocks of the history), `"prefill"` or `"self"` (the
            current blocks; of a context that is being encoded, or of all frames there are).
        keep_frames: `[B, T]` bool over the candidate frames; dropped ones are not visited. In
            prefill their queries see text and their own tile only.
        site: name for the counts; several, comma separated, where layers share this call.
        history_means: result of `lipass::pool_blocks` on the history, in decode; otherwise the
            call computes it.
        key_bias: added to the scores of each key, over all segments in order, `[B or 1, Lk]` or
            `[B or 1, H or 1, Lk]` floats. Blocks are chosen without it. Or what
            `lipass::steering_bias` says for each latent of the queries `[1, 1, Tq, Lk]`.
        planner: who chooses blocks: `"mean"` by products of means over blocks, `"cosine"` by
            their cosines, `"buckets"` as the first, over blocks of like keys; as many as the
            budget says. `"given"` takes `blocks`, whatever the budget.
        blocks: key blocks that each query block visits `[B or 1, H or 1, Nq, S]` ints, numbered
            over the segments, ascending.
        block_counts: how many of the `S` count `[B or 1, H or 1, Nq]` ints; all by default.
        latent_mask: which latents of the queries see which latents of the history and current
            keys `[B or 1, Tq, Tk]` bool, where the tile is of one latent. All see the text.
        history_order: result of `lipass::key_order` on the history, with planner `"buckets"`:
            blocks are then runs of keys in this order and of queries sorted alike, and
            `history_means` those of `lipass::pool_in_order`.
        history_basis: result of `lipass::key_basis` that `history_order` was made with.
        tile_order: roles whose keys lie tile by tile (`lipass::tile_order`), comma separated;
            queries lie as current keys do. Their blocks are runs of as many tokens as a tile has.
    """
    layout, grid = resolve_layout(tuple(q_grid), tuple(kv_grids), roles, tuple(tile), tile_order)
    ramp = None
    if key_bias is not None and key_bias.dim() == 2:
        key_bias = key_bias[:, None]
    elif key_bias is not None and key_bias.dim() == 4:
        rows = added(key_bias)
        ramp = None if rows is None or rows.shape[2] == 1 else rows
        key_bias = None if rows is None or ramp is not None else rows[:, :, 0].float()
    given = None if blocks is None else GivenBlocks(blocks, block_counts)
    buckets = None
    if history_order is not None and history_basis is not None:
        buckets = Buckets(history_order, history_basis)
    return Call(
        q,
        k,
        v,
        grid,
        layout,
        budget,
        scale,
        sink_latents,
        role,
        keep_frames,
        registry.site_of_call(site),
        history_means,
        key_bias,
        planner,
        given,
        latent_mask,
        buckets,
        ramp,
    )


def _sparse_attention(*args: object, **kwargs: object) -> Tensor:
    """Attend from `q` to the segments `k`, `v`, sparse where that pays; arguments as in `_call`.

    Returns:
        Output `[B, H, Lq, D]` in `q.dtype`, in memory `[B, Lq, H, D]`.

    Raises:
        ValueError: if the segments do not fit their grids or an option is out of range.
    """
    out, _ = attend(_call(*args, **kwargs), lse=False)  # type: ignore[arg-type]
    return out


def _sparse_attention_lse(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Attend, and give what `lipass.kernels.merge_partials` needs to join parts of the keys.

    Returns:
        Output as that of `lipass::sparse_attention`, and the log-sum-exp of the scores that were
        computed `[B, H, Lq]` fp32, base e.
    """
    out, lse = attend(_call(*args, **kwargs), lse=True)  # type: ignore[arg-type]
    assert lse is not None
    return out, lse


def _sparse_attention_fake(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    return empty_token_major(q)


def _sparse_attention_lse_fake(
    q: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _pool_blocks(x: Tensor, grid: list[int], tile: list[int]) -> Tensor:
    """Average the tokens `[B, H, L, D]` of each block, `[B, H, N, D]` fp32.

    Raises:
        ValueError: if `x` does not have the tokens of the grid.
    """
    return pool_blocks(x, BlockGrid(triple(tuple(grid)), triple(tuple(tile))))


def _pool_blocks_fake(x: Tensor, grid: list[int], tile: list[int]) -> Tensor:
    blocks = math.prod(-(-size // step) for size, step in zip(grid, tile, strict=True))
    return x.new_empty(*x.shape[:2], blocks, x.shape[3], dtype=torch.float32)


for _name, _real, _fake in (
    ("sparse_attention", _sparse_attention, _sparse_attention_fake),
    ("sparse_attention_lse", _sparse_attention_lse, _sparse_attention_lse_fake),
    ("pool_blocks", _pool_blocks, _pool_blocks_fake),
):
    _library.impl(_name, in_given_dtypes(_real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lipass::{_name}", _fake, lib=_library)
