"""Register `lipass::sparse_attention`: pool, select and attend behind one operator.

One boundary a call site. The operator is opaque to the inner compiler and has no state of its own;
what it decided is counted in `lipass.kernels.registry`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import cost, registry
from lipass.kernels.pieces import attend_to_all
from lipass.kernels.plan import BlockGrid, KvLayout, Triple
from lipass.kernels.planning import check_means, plan_attention
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select.api import selected_blocks
from lipass.kernels.token_major import empty_token_major, token_major

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define(
    "sparse_attention(Tensor q, Tensor[] k, Tensor[] v, SymInt[] q_grid, SymInt[] kv_grids, "
    "str roles, int[] tile, float budget, float scale, int sink_latents, str role, "
    "Tensor? keep_frames, str site, *, Tensor? history_means=None) -> Tensor"
)
_library.define("pool_blocks(Tensor x, SymInt[] grid, int[] tile) -> Tensor")


class _Call(NamedTuple):
    """One call with its grids resolved."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    q_grid: BlockGrid
    layout: KvLayout
    budget: float
    scale: float
    sink_latents: int
    role: str
    keep_frames: Tensor | None
    site: str
    history_means: Tensor | None


def _sparse_attention(
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
) -> Tensor:
    """Attend from `q` to the segments `k`, `v`, sparse where that pays.

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
        role: `"prefill"` (candidates are the current blocks) or `"decode"` (the history).
        keep_frames: `[B, T]` bool over the candidate frames; dropped ones are not visited. In
            prefill their queries see text and their own tile only.
        site: name for the counts; several, comma separated, where layers share this call.
        history_means: result of `lipass::pool_blocks` on the history, in decode; otherwise the
            call computes it.

    Returns:
        Output `[B, H, Lq, D]` in `q.dtype`, in memory `[B, Lq, H, D]`.

    Raises:
        ValueError: if the segments do not fit their grids or an option is out of range.
    """
    layout, grid = resolve_layout(tuple(q_grid), tuple(kv_grids), roles, tuple(tile))
    site = registry.site_of_call(site)
    total = q.shape[0] * q.shape[1] * grid.blocks * layout.blocks
    call = _Call(
        q, k, v, grid, layout, budget, scale, sink_latents, role, keep_frames, site, history_means
    )
    _check(call)
    if keep_frames is None or layout.candidate_segment(role) is None:
        return _attend(call._replace(keep_frames=None), total, 0)
    if keep_frames.device.type != "cpu":
        return _attend(call, total, 0)
    # On the host the mask can be read for free: frames that no batch item keeps leave before
    # tiling, so that kept frames fill their tiles.
    if keep_frames.all():
        return _attend(call._replace(keep_frames=None), total, 0)
    kept = keep_frames.any(0).nonzero()[:, 0]
    dropped = keep_frames.shape[1] - kept.numel()
    uniform = bool((keep_frames.any(0) == keep_frames.all(0)).all())
    smaller = call._replace(
        sink_latents=int((kept < sink_latents).sum()),
        keep_frames=None if uniform else keep_frames.index_select(1, kept),
    )
    if dropped == 0:
        return _attend(smaller, total, 0)
    if role == "decode":
        return _attend(_without_frames(smaller, kept), total, dropped)
    lost = (~keep_frames.any(0)).nonzero()[:, 0]
    out = empty_token_major(q)
    frames = out.unflatten(2, (grid.grid[0], -1))
    frames[:, :, lost] = _attend_own_frame(call, lost)
    if kept.numel():
        part = _attend(_without_frames(smaller, kept), total, dropped)
        frames[:, :, kept] = part.unflatten(2, (kept.numel(), -1))
    return out


def _attend(call: _Call, total_blocks: int, dropped_latents: int) -> Tensor:
    """Run one call sparse or dense, whichever the gate says, and count it."""
    heads = call.q.shape[0] * call.q.shape[1]
    count = functools.partial(
        registry.record_call,
        call.site,
        role=call.role,
        total=total_blocks,
        dropped_latents=dropped_latents,
    )
    reason = _why_dense(call)
    if reason:
        visited = heads * call.q_grid.blocks * call.layout.blocks
        out, provider = _dense(call)
        count(provider=provider, visited=visited, kept_dense=reason)
        return out
    plan = plan_attention(
        call.q,
        call.k,
        call.layout,
        call.q_grid,
        budget=call.budget,
        scale=call.scale,
        role=call.role,
        sink_latents=call.sink_latents,
        keep_frames=call.keep_frames,
        candidate_means=call.history_means,
    )
    chosen = registry.choose(
        "block_sparse", call.q.device, None, lambda module: module.why_not(call.q, plan)
    )
    for name, refusal in chosen.refusals:
        registry.record_refusal(call.site, name, refusal)
    count(
        provider=chosen.name,
        visited=plan.indices.numel() if plan.uniform else plan.counts.sum(),
    )
    out, _ = chosen.module.block_sparse_attention(
        call.q, call.k, call.v, plan, scale=call.scale, key_bias=None
    )
    return out


def _why_dense(call: _Call) -> str:
    """Give the reason to run dense attention over the kept keys, or nothing."""
    if call.budget >= 1.0:
        return "budget 1.0 visits every block"
    route = registry.forced_route()
    if route == "sparse":
        return ""
    if route == "dense":
        return "forced by registry.force"
    width = selected_blocks(call.layout, call.q_grid, call.budget, call.role, call.sink_latents)
    if width == call.layout.blocks and call.keep_frames is None:
        return "protected blocks and budget together visit every block"
    q = call.q
    return cost.predict(q.shape, q.dtype, q.device, call.layout, call.q_grid, width).why_dense


def _dense(call: _Call) -> tuple[Tensor, str]:
    if call.keep_frames is None:
        return attend_to_all(call.q, call.k, call.v, call.scale)
    plan = plan_attention(
        call.q,
        call.k,
        call.layout,
        call.q_grid,
        budget=1.0,
        scale=call.scale,
        role=call.role,
        sink_latents=0,
        keep_frames=call.keep_frames,
    )
    mask = plan.to_dense_mask()
    k, v = torch.cat(call.k, 2), torch.cat(call.v, 2)
    out = F.scaled_dot_product_attention(call.q, k, v, attn_mask=mask, scale=call.scale)
    return token_major(out), "sdpa"


def _without_frames(call: _Call, kept: Tensor) -> _Call:
    """Take frames out of the candidate segment, and of the queries in prefill."""
    number = call.layout.candidate_segment(call.role)
    assert number is not None
    grid = call.layout.segments[number].grid
    k, v = list(call.k), list(call.v)
    k[number], v[number] = _frames(k[number], grid, kept), _frames(v[number], grid, kept)
    frames = (kept.numel(), *grid.grid[1:])
    layout = call.layout.replace_grid(number, BlockGrid(frames, grid.tile))
    means = call.history_means
    if means is not None:
        # Tiles that span frames are cut anew among those that stay.
        means = _frames(means, grid, kept) if grid.tile[0] == 1 else None
    call = call._replace(k=k, v=v, layout=layout, history_means=means)
    if call.role == "decode":
        return call
    q = _frames(call.q, call.q_grid, kept)
    return call._replace(q=q, q_grid=BlockGrid(frames, call.q_grid.tile))


def _frames(x: Tensor, grid: BlockGrid, kept: Tensor) -> Tensor:
    return x.unflatten(2, (grid.grid[0], -1)).index_select(2, kept).flatten(2, 3)


def _attend_own_frame(call: _Call, lost: Tensor) -> Tensor:
    """Attend from dropped frames to text and themselves, `[B, H, lost, Y * X, D]`.

    Nobody reads these rows; they only have to stay finite.
    """
    frames, batch, heads = call.q_grid.grid[0], call.q.shape[0], call.q.shape[1]
    number = call.layout.candidate_segment(call.role)
    assert number is not None
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for n, (k, v) in enumerate(zip(call.k, call.v, strict=True)):
        for parts, x in ((keys, k), (values, v)):
            if n == number:
                part = x.unflatten(2, (frames, -1)).index_select(2, lost)
            else:
                part = x[:, :, None].expand(batch, heads, lost.numel(), -1, -1)
            parts.append(part)
    q = call.q.unflatten(2, (frames, -1)).index_select(2, lost)
    k, v = (torch.cat(parts, 3).flatten(1, 2) for parts in (keys, values))
    out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, scale=call.scale)
    return out.unflatten(1, (heads, -1))


@functools.lru_cache(maxsize=512)
def resolve_layout(
    q_grid: tuple[int, ...], kv_grids: tuple[int, ...], roles: str, tile: tuple[int, ...]
) -> tuple[KvLayout, BlockGrid]:
    """Build the layout of keys and the grid of queries that arguments of the operator spell."""
    names = tuple(name.strip() for name in roles.split(","))
    if len(kv_grids) != 3 * len(names):
        raise ValueError(
            f"kv_grids must hold 3 numbers per role, got {len(kv_grids)} for roles {roles!r}; "
            "write text of L tokens as 1, 1, L"
        )
    triples = tuple(_triple(kv_grids[n : n + 3]) for n in range(0, len(kv_grids), 3))
    if len(tile) not in (3, 6):
        raise ValueError(
            f"tile must be 3 sizes, or 6 with a query tile, got {tile}; try (4, 4, 4)"
        )
    layout = KvLayout.build(names, triples, _triple(tile[:3]))
    return layout, BlockGrid(_triple(q_grid), _triple(tile[-3:]))


def _triple(sizes: tuple[int, ...]) -> Triple:
    t, y, x = sizes
    return (t, y, x)


def _check(call: _Call) -> None:
    tokens = [segment.grid.tokens for segment in call.layout.segments]
    for name, parts in (("k", call.k), ("v", call.v)):
        found = [part.shape[2] for part in parts]
        if found != tokens:
            raise ValueError(
                f"{name} must hold {tokens} tokens by segment as kv_grids say, got {found}; "
                "pass one tensor per role, in order"
            )
    if call.q.shape[2] != call.q_grid.tokens:
        raise ValueError(
            f"q must hold {call.q_grid.tokens} tokens as q_grid {call.q_grid.grid} says, got "
            f"{call.q.shape[2]}; pass the grid of these queries"
        )
    if not 0.0 < call.budget <= 1.0:
        raise ValueError(f"budget must be in (0, 1], got {call.budget}; 1.0 is dense attention")
    if call.role not in ("prefill", "decode"):
        raise ValueError(
            f"role must be 'prefill' or 'decode', got {call.role!r}; leave other attention dense"
        )
    means = call.history_means
    if means is not None and call.role != "decode":
        raise ValueError(
            "history_means must come with role 'decode', got 'prefill'; leave them out there"
        )
    number = call.layout.candidate_segment(call.role)
    if means is not None:
        check_means(means, call.q, call.layout, number)
    frames = 0 if number is None else call.layout.segments[number].grid.grid[0]
    keep = call.keep_frames
    if keep is not None and keep.shape != (call.q.shape[0], frames):
        raise ValueError(
            f"keep_frames must be [B, T] = [{call.q.shape[0]}, {frames}], got "
            f"{list(keep.shape)}; it covers the history in decode and the current in prefill"
        )


def _sparse_attention_fake(
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
) -> Tensor:
    return empty_token_major(q)


def _pool_blocks(x: Tensor, grid: list[int], tile: list[int]) -> Tensor:
    """Average the tokens `[B, H, L, D]` of each block, `[B, H, N, D]` fp32.

    Raises:
        ValueError: if `x` does not have the tokens of the grid.
    """
    return pool_blocks(x, BlockGrid(_triple(tuple(grid)), _triple(tuple(tile))))


def _pool_blocks_fake(x: Tensor, grid: list[int], tile: list[int]) -> Tensor:
    blocks = math.prod(-(-size // step) for size, step in zip(grid, tile, strict=True))
    return x.new_empty(*x.shape[:2], blocks, x.shape[3], dtype=torch.float32)


_library.impl("sparse_attention", _sparse_attention, "CompositeExplicitAutograd")
torch.library.register_fake("lipass::sparse_attention", _sparse_attention_fake, lib=_library)
_library.impl("pool_blocks", _pool_blocks, "CompositeExplicitAutograd")
torch.library.register_fake("lipass::pool_blocks", _pool_blocks_fake, lib=_library)
