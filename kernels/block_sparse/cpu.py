"""Gather key blocks and attend to them with dense kernels: the form that needs no compiler.

Each query block gets its keys in one copy, in runs of tokens that lie together in memory; a chunk
of query blocks then shares one call of `scaled_dot_product_attention`. Measured on Zen 3, fp32,
one core, 60 query blocks of 64 x 544 keys x 64 (density 0.41, dense 18.3 ms): 9.9 ms, 10.5 with
scores, softmax and values as three batched calls. Fresh memory costs more than copying into memory
in use (7-25 ms for 2 x 8 MiB in page faults), hence chunks and a buffer that stays.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout, Segment

# Gathered keys and values of one chunk: 4 MiB, the best of 1, 2, 4 and 8 on Zen 3 (32 MiB of L3).
_CHUNK_BYTES = 4 << 20
# Larger buffers are not kept: their copies take longer than their page faults.
_BUFFER_BYTES = 16 << 20

_buffers = threading.local()


class _Gather(NamedTuple):
    """Where the keys of each query block lie; an item is one query block of one head."""

    run: int  # tokens copied together
    rows: Tensor  # [items, keys / run] rows of the `[B * H * Lk / run, run * D]` view
    bias: Tensor | None  # [items, keys] fp32 added to the scores; None where it would be all 0


def why_not(q: Tensor, plan: BlockPlan) -> str | None:
    """Refuse what is not on the CPU."""
    if q.device.type != "cpu":
        return f"runs on CPU tensors, got {q.device.type}"
    if torch.is_grad_enabled() and q.requires_grad:
        return "has no backward, and q requires one"
    return None


def block_sparse_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    plan: BlockPlan,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend; see `lipass.kernels.block_sparse.api`."""
    batch, heads, _, dim = q.shape
    gather = _masked_gather(plan, key_bias) if _needs_mask(plan, key_bias) else _plain_gather(plan)
    k_rows, v_rows = _rows(keys, gather.run, "keys"), _rows(values, gather.run, "values")
    q_items = _to_tiles(q, plan.q_grid).reshape(-1, plan.q_grid.block_tokens, dim)
    items, rows, _ = q_items.shape
    columns = gather.rows.shape[1] * gather.run

    out = torch.empty_like(q_items)
    lse = torch.empty(items, rows) if return_lse else None
    chunks = -(-items * columns * dim * 2 * q.element_size() // _CHUNK_BYTES)
    step = max(-(-items // max(chunks, 1)), 1)
    for start in range(0, items, step):
        part = slice(start, min(start + step, items))
        picked = gather.rows[part].reshape(-1)
        k_part = _take(k_rows, picked, "k").view(-1, columns, dim)
        v_part = _take(v_rows, picked, "v").view(-1, columns, dim)
        bias = None if gather.bias is None else gather.bias[part, None]
        if lse is None:
            _attend(q_items[part], k_part, v_part, bias, scale, out[part])
        else:
            _attend_lse(q_items[part], k_part, v_part, bias, scale, out[part], lse[part])
    if gather.bias is not None:
        # Rows without a key: the softmax of nothing is nan, by contract the output is 0.
        blind = (gather.bias == -math.inf).all(-1)
        out.masked_fill_(blind[:, None, None], 0.0)

    merged = _to_tokens(out.view(batch, heads, -1, rows, dim), plan.q_grid)
    if lse is None:
        return merged, None
    return merged, _to_tokens(lse.view(batch, heads, -1, rows, 1), plan.q_grid)[..., 0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor
) -> None:
    """Attend item by item: `[c, rows, D]` to `[c, keys, D]`."""
    mask = None if bias is None else bias.to(q.dtype).expand(-1, q.shape[1], -1)[None]
    out.copy_(F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale)[0])


def _attend_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Attend in three steps in fp32, because the fused call keeps its log-sum-exp to itself."""
    score = (q.float() @ k.float().mT) * scale
    if bias is not None:
        score += bias
    torch.logsumexp(score, -1, out=lse)
    out.copy_(score.softmax(-1) @ v.float())


def _needs_mask(plan: BlockPlan, key_bias: Tensor | None) -> bool:
    """Whether some gathered slot is no key, or some key has a bias."""
    _, chosen, _ = _columns(plan)
    full = all(segment.grid.is_full for segment in chosen)
    return key_bias is not None or plan.key_keep is not None or not plan.uniform or not full


def _columns(plan: BlockPlan) -> tuple[slice, list[Segment], list[range]]:
    """Split the columns of the plan: those to look up, and the segments every row visits whole.

    Returns the columns to look up, the segments they may name, and the token ranges of the rest.
    """
    segments = plan.kv.segments
    width, before, after = plan.indices.shape[-1], 0, len(segments)
    if plan.uniform:
        while before < after and before in plan.shared_segments:
            before += 1
        while after > before and after - 1 in plan.shared_segments:
            after -= 1
    front = sum(segment.grid.blocks for segment in segments[:before])
    back = sum(segment.grid.blocks for segment in segments[after:])
    whole = [plan.kv.token_range(n) for n in (*range(before), *range(after, len(segments)))]
    return slice(front, width - back), list(segments[before:after]), whole


def _plain_gather(plan: BlockPlan) -> _Gather:
    """Copy in the longest runs that all blocks consist of; every slot is a key."""
    columns, _, whole = _columns(plan)
    run = _run_tokens(plan.kv, columns.start, columns.stop)
    table = _run_table(plan.kv, run)
    chosen = plan.indices[..., columns]
    batch, heads, blocks, _ = chosen.shape
    index = table.index_select(0, chosen.reshape(-1)).view(batch * heads, blocks, -1)
    if whole:
        rest = _range_table(tuple(whole), run).expand(batch * heads, blocks, -1)
        index = torch.cat([index, rest], -1)
    first = torch.arange(batch * heads).mul_(plan.kv.tokens // run)
    return _Gather(run, (index + first[:, None, None]).flatten(0, 1), None)


def _masked_gather(plan: BlockPlan, key_bias: Tensor | None) -> _Gather:
    """Copy token by token; the bias hides slots that are no key."""
    batch, heads, _, width = plan.indices.shape
    token = plan.kv.token_index()[plan.indices.clamp(min=0).long()]  # [B, H, Nq, S, slots]
    counted = torch.arange(width) < plan.counts[..., None]
    seen = ((token >= 0) & counted[..., None]).flatten(3)
    token = token.flatten(3).clamp(min=0)
    owner = torch.arange(batch).view(batch, 1, 1, 1)
    if plan.key_keep is not None:
        seen = seen & plan.key_keep[owner, token]
    bias = torch.zeros(seen.shape)
    if key_bias is not None:
        bias = key_bias.float().expand(batch, -1)[owner, token]
    bias = bias.masked_fill(~seen, -math.inf)
    first = torch.arange(batch * heads).view(batch, heads, 1, 1) * plan.kv.tokens
    return _Gather(1, (token + first).flatten(0, 2), bias.flatten(0, 2))


def _rows(parts: list[Tensor], run: int, name: str) -> Tensor:
    """View keys or values as one row per run of tokens, `[B * H * Lk / run, run * D]`."""
    parts = [part for part in parts if part.shape[2]]
    whole = parts[0]
    if len(parts) > 1:
        batch, heads, _, dim = whole.shape
        shape = (batch, heads, sum(part.shape[2] for part in parts), dim)
        whole = torch.cat(parts, 2, out=_buffer(name, shape, whole.dtype))
    return whole.reshape(-1, run * whole.shape[-1])


def _take(source: Tensor, rows: Tensor, name: str) -> Tensor:
    out = _buffer(name, (rows.numel(), source.shape[1]), source.dtype)
    return torch.index_select(source, 0, rows, out=out)


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory of this thread that earlier calls have touched; its contents are anything."""
    size = math.prod(shape) * dtype.itemsize
    if size > _BUFFER_BYTES:
        return torch.empty(shape, dtype=dtype)
    held = getattr(_buffers, name, None)
    if held is None or held.numel() < size:
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        setattr(_buffers, name, held)
    return held[:size].view(dtype).view(shape)


def _to_tiles(x: Tensor, grid: BlockGrid) -> Tensor:
    """Reorder `[B, H, L, D]` into tiles `[B, H, N, slots, D]`; empty slots hold anything."""
    if not grid.is_full:
        index = grid.token_index().clamp(min=0).flatten()
        return x.index_select(2, index).unflatten(2, (grid.blocks, grid.block_tokens))
    (tile_t, tile_y, tile_x), (block_t, block_y, block_x) = grid.tile, grid.block_shape
    split = x.unflatten(2, (block_t, tile_t, block_y, tile_y, block_x, tile_x))
    return split.permute(0, 1, 2, 4, 6, 3, 5, 7, 8).flatten(5, 7).flatten(2, 4)


def _to_tokens(x: Tensor, grid: BlockGrid) -> Tensor:
    """Undo `_to_tiles`, `[B, H, N, slots, D]` to contiguous `[B, H, L, D]`."""
    if not grid.is_full:
        return x.flatten(2, 3).index_select(2, grid.slot_of_token())
    (tile_t, tile_y, tile_x), (block_t, block_y, block_x) = grid.tile, grid.block_shape
    split = x.view(*x.shape[:2], block_t, block_y, block_x, tile_t, tile_y, tile_x, x.shape[-1])
    return split.permute(0, 1, 2, 5, 3, 6, 4, 7, 8).flatten(2, 7)


@functools.lru_cache(maxsize=512)
def _run_tokens(layout: KvLayout, first_block: int, last_block: int) -> int:
    """Return the longest run that tiles segments and blocks alike, in tokens."""
    run = math.gcd(*(segment.grid.tokens for segment in layout.segments))
    for number, segment in enumerate(layout.segments):
        (_, size_y, size_x), (tile_t, tile_y, tile_x) = segment.grid.grid, segment.grid.tile
        blocks = layout.block_range(number)
        if segment.grid.tokens == 0 or blocks.stop <= first_block or blocks.start >= last_block:
            continue
        inside = tile_x
        if tile_x == size_x:
            inside *= tile_y
            if tile_y == size_y:
                inside *= tile_t
        run = math.gcd(run, inside)
    return run


@functools.lru_cache(maxsize=512)
def _run_table(layout: KvLayout, run: int) -> Tensor:
    """Runs of each block, `[Nk, block_tokens / run]` int64."""
    return layout.token_index()[:, ::run].clamp(min=0) // run


@functools.lru_cache(maxsize=512)
def _range_table(ranges: tuple[range, ...], run: int) -> Tensor:
    """Runs of whole segments."""
    return torch.cat([torch.arange(r.start, r.stop, run) // run for r in ranges])
