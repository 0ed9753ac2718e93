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

from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.token_major import token_major

# Gathered keys and values of one chunk: 4 MiB, the best of 1, 2, 4 and 8 on Zen 3 (32 MiB of L3).
_CHUNK_BYTES = 4 << 20
# Larger buffers are not kept: their copies take longer than their page faults.
_BUFFER_BYTES = 16 << 20

_buffers = threading.local()


class _Gather(NamedTuple):
    """Where the keys of each query block lie."""

    segment: int | None  # the one that is gathered from; None is all of them joined
    shared: tuple[int, ...]  # segments that every query block takes whole
    run: int  # tokens copied together
    rows: Tensor  # [B * H, Nq, keys / run] rows of the source, `run * D` numbers each
    bias: Tensor | None  # [B * H, Nq, keys] fp32 added to the scores; None where it would be all 0


def why_not(kind: Kind) -> str | None:
    """Refuse what is not on the CPU."""
    if kind.device.type != "cpu":
        return f"runs on CPU tensors, got {kind.device.type}"
    if kind.records:
        return "has no backward, and q, k, v or a bias requires one"
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
    masked = _needs_mask(plan, key_bias)
    gather = _masked_gather(plan, key_bias) if masked else _plain_gather(plan, len(keys) > 1)
    k_rows, v_rows = _source(keys, gather, "keys"), _source(values, gather, "values")
    k_shared, v_shared = _shared(keys, gather, plan.kv), _shared(values, gather, plan.kv)
    q_tiles = _to_tiles(q, plan.q_grid).flatten(0, 1)  # [B * H, Nq, slots, D]
    pairs, blocks, slots, _ = q_tiles.shape
    columns = gather.rows.shape[2] * gather.run + sum(part.shape[1] for part in k_shared)

    outputs, lses = [], []
    for part in _chunks(pairs, blocks, columns * dim * 2 * q.element_size()):
        picked = gather.rows[part].reshape(-1)
        k_part = _collect(k_rows, picked, k_shared, part, dim, "k")
        v_part = _collect(v_rows, picked, v_shared, part, dim, "v")
        bias = None if gather.bias is None else gather.bias[part].flatten(0, 1)[:, None]
        q_part = q_tiles[part].flatten(0, 1)
        attend = _attend_lse if return_lse else _attend
        found, lse = attend(q_part, k_part, v_part, bias, scale)
        outputs.append(found)
        lses.append(lse)
    out = _joined(outputs).view(q_tiles.shape)
    if gather.bias is not None:
        # Rows without a key: the softmax of nothing is nan, by contract the output is 0.
        blind = (gather.bias == -math.inf).all(-1)
        out.masked_fill_(blind[..., None, None], 0.0)
    merged = token_major(_to_tokens(out.unflatten(0, (batch, heads)), plan.q_grid))
    if not return_lse:
        return merged, None
    rows = _joined(lses).view(batch, heads, blocks, slots, 1)
    return merged, _to_tokens(rows, plan.q_grid)[..., 0]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(pairs: int, blocks: int, bytes_per_block: int) -> list[tuple[slice, slice]]:
    """Cut `[B * H, Nq]` into whole heads, or one head into runs of query blocks."""
    fit = max(_CHUNK_BYTES // max(bytes_per_block, 1), 1)
    heads = max(fit // max(blocks, 1), 1)
    heads = -(-pairs // -(-pairs // heads))
    step = blocks if fit >= blocks else -(-blocks // -(-blocks // fit))
    return [
        (slice(h, min(h + heads, pairs)), slice(n, min(n + step, blocks)))
        for h in range(0, pairs, heads)
        for n in range(0, blocks, max(step, 1))
    ]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend block by block, `[c, slots, D]` to `[c, keys, D]`; the second result is empty."""
    # In fp32, as a CPU takes it beside any dtype: log m in bf16 is 1 % off.
    mask = None if bias is None else bias.expand(-1, q.shape[1], -1)[None]
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale)
    return out[0], out.new_empty(0)


def _attend_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in three steps in fp32, because the fused call keeps its log-sum-exp to itself."""
    score = (q.float() @ k.float().mT) * scale
    if bias is not None:
        score += bias
    return (score.softmax(-1) @ v.float()).to(q.dtype), score.logsumexp(-1)


def _needs_mask(plan: BlockPlan, key_bias: Tensor | None) -> bool:
    """Whether some gathered slot is no key, or some key has a bias."""
    if key_bias is not None or plan.key_keep is not None or not plan.uniform:
        return True
    segments = plan.kv.segments
    return not all(
        segments[n].grid.is_full for n in range(len(segments)) if n not in plan.shared_segments
    )


def _plain_gather(plan: BlockPlan, by_segment: bool) -> _Gather:
    """Copy in the longest runs that the blocks consist of; every slot is a key.

    Either from one segment, and the shared ones are copied behind it; or from all segments joined,
    which copies every key once and what is gathered once less.
    """
    layout, shared = plan.kv, plan.shared_segments
    left = [n for n in range(len(layout.segments)) if n not in shared]
    if len(left) != 1:
        shared, left = (), list(range(len(layout.segments)))
    spans = [layout.block_range(n) for n in left]
    columns = slice(0, plan.indices.shape[-1])
    if shared:
        after = sum(layout.segments[n].grid.blocks for n in shared if n > left[0])
        columns = slice(spans[0].start, plan.indices.shape[-1] - after)
    chosen = plan.indices[..., columns].flatten(0, 1)  # [B * H, Nq, S]
    pairs, blocks, count = chosen.shape
    alone = by_segment and shared and blocks * count * layout.block_tokens < layout.tokens
    segment = left[0] if alone else None
    run, table, rest, tokens = _run_table(layout, spans[0], spans[-1], segment, shared)
    rows = table.index_select(0, chosen.reshape(-1)).view(pairs, blocks, -1)
    if not alone and shared:
        rows = torch.cat([rows, rest.expand(pairs, blocks, -1)], 2)
    rows += _first_rows(pairs, tokens // run)
    return _Gather(segment, shared if alone else (), run, rows, None)


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
    bias = torch.zeros(seen.shape, dtype=torch.float32)
    if key_bias is not None:
        head = torch.arange(heads).view(1, heads, 1, 1)
        bias = key_bias.float().expand(batch, heads, -1)[owner, head, token]
    bias = bias.masked_fill(~seen, -math.inf)
    first = torch.arange(batch * heads).view(batch, heads, 1, 1) * plan.kv.tokens
    return _Gather(None, (), 1, (token + first).flatten(0, 1), bias.flatten(0, 1))


def _source(parts: list[Tensor], gather: _Gather, name: str) -> Tensor:
    """View what is gathered from as one row per run of tokens, `[B * H * L / run, run * D]`."""
    whole = parts[0] if gather.segment is None else parts[gather.segment]
    if gather.segment is None and len(parts) > 1:
        batch, heads, _, dim = whole.shape
        shape = (batch, heads, sum(part.shape[2] for part in parts), dim)
        whole = torch.cat(parts, 2, out=_buffer(name, shape, whole.dtype))
    return whole.reshape(-1, gather.run * whole.shape[-1])


def _shared(parts: list[Tensor], gather: _Gather, layout: KvLayout) -> list[Tensor]:
    """Select the segments that every query block takes whole, `[B * H, L, D]` each."""
    spans = [layout.token_range(n) for n in gather.shared]
    if gather.segment is None:
        found = [parts[0][:, :, span.start : span.stop] for span in spans]
    else:
        found = [parts[n] for n in gather.shared]
    return [part.flatten(0, 1) for part in found if part.shape[2]]


def _collect(
    source: Tensor,
    picked: Tensor,
    shared: list[Tensor],
    part: tuple[slice, slice],
    dim: int,
    name: str,
) -> Tensor:
    """Copy the keys of one chunk together, `[c, keys, D]`."""
    heads, blocks = (span.stop - span.start for span in part)
    found = _take(source, picked, f"{name}_found").view(heads, blocks, -1, dim)
    if not shared:
        return found.flatten(0, 1)
    parts = [found, *(x[part[0], None].expand(-1, blocks, -1, -1) for x in shared)]
    shape = (heads, blocks, sum(x.shape[2] for x in parts), dim)
    return torch.cat(parts, 2, out=_buffer(name, shape, source.dtype)).flatten(0, 1)


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
@torch.inference_mode(False)
def _run_table(
    layout: KvLayout, first: range, last: range, segment: int | None, shared: tuple[int, ...]
) -> tuple[int, Tensor, Tensor, int]:
    """Tabulate runs of keys, counted from the start of a segment, or of all keys if it is None.

    Returns the longest run, in tokens, that tiles the blocks between `first` and `last`, and the
    shared segments too where all keys are joined; the runs of each block, `[Nk, slots / run]`;
    those of the shared segments; and the tokens that one head has.
    """
    span = range(layout.tokens) if segment is None else layout.token_range(segment)
    run = len(span)
    for number, part in enumerate(layout.segments):
        (_, size_y, size_x), (tile_t, tile_y, tile_x) = part.grid.grid, part.grid.tile
        blocks, tokens = layout.block_range(number), layout.token_range(number)
        if segment is None:
            run = math.gcd(run, tokens.start, tokens.stop)
        if not blocks or blocks.stop <= first.start or blocks.start >= last.stop:
            continue
        inside = tile_x
        if tile_x == size_x:
            inside *= tile_y
            if tile_y == size_y:
                inside *= tile_t
        run = math.gcd(run, inside)
    run = max(run, 1)
    whole = [
        torch.arange(span_.start, span_.stop, run) for span_ in map(layout.token_range, shared)
    ]
    rest = torch.cat(whole) // run if whole else torch.zeros(0, dtype=torch.int64)
    table = (layout.token_index() - span.start).clamp(min=0)[:, ::run] // run
    return run, table, rest, len(span)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _first_rows(pairs: int, step: int) -> Tensor:
    """Row at which each head starts, `[B * H, 1, 1]`."""
    return (torch.arange(pairs) * step).view(pairs, 1, 1)
