"""Take dropped frames out of a call before its tokens fall into tiles."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lipass.kernels.call import Call
from lipass.kernels.dense import attend_plainly
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.tile_order import place_of_token


def without_frames(call: Call, kept: Tensor) -> Call:
    """Take frames out of the candidate segment, and of the queries in prefill."""
    number = call.candidate
    assert number is not None
    grid = call.layout.segments[number].grid
    k, v = list(call.k), list(call.v)
    k[number], v[number] = pick_frames(k[number], grid, kept), pick_frames(v[number], grid, kept)
    frames = (kept.numel(), *grid.grid[1:])
    layout = call.layout.replace_grid(number, replace(grid, grid=frames))
    means = call.history_means
    if means is not None:
        # Tiles that span frames are cut anew among those that stay.
        means = pick_frames(means, grid, kept) if grid.latents_apart else None
    bias = call.key_bias
    if bias is not None:
        parts = list(bias.split([segment.grid.tokens for segment in call.layout.segments], 2))
        parts[number] = pick_frames(parts[number], grid, kept)
        bias = torch.cat(parts, 2)
    call = call._replace(k=k, v=v, layout=layout, history_means=means, key_bias=bias)
    if call.role == "decode":
        return call
    q = pick_frames(call.q, call.q_grid, kept)
    return call._replace(q=q, q_grid=replace(call.q_grid, grid=frames))


def mixes_latents(call: Call) -> bool:
    """Whether frames cannot leave as runs of tokens, since tiles of several lie together."""
    number = call.candidate
    grid = None if number is None else call.layout.segments[number].grid
    return grid is not None and grid.in_order and grid.tile[0] > 1


def row_major(call: Call) -> Call:
    """Put tokens that lie tile by tile back, with the same tiles, bias and frames."""
    k, v, grids, biases = list(call.k), list(call.v), [], []
    bias = call.key_bias
    parts = None if bias is None else bias.split(call.layout.segment_tokens, 2)
    for n, segment in enumerate(call.layout.segments):
        back = _back(segment.grid, call.q.device)
        if back is not None:
            k[n], v[n] = k[n].index_select(2, back), v[n].index_select(2, back)
        if parts is not None:
            biases.append(parts[n] if back is None else parts[n].index_select(2, back))
        grids.append(replace(segment, grid=replace(segment.grid, in_order=False)))
    back = _back(call.q_grid, call.q.device)
    return call._replace(
        q=call.q if back is None else call.q.index_select(2, back),
        k=k,
        v=v,
        q_grid=replace(call.q_grid, in_order=False),
        layout=KvLayout(tuple(grids)),
        history_means=None,
        key_bias=torch.cat(biases, 2) if biases else None,
    )


def _back(grid: BlockGrid, device: torch.device) -> Tensor | None:
    return place_of_token(grid.grid, grid.tile).to(device) if grid.in_order else None


def pick_frames(x: Tensor, grid: BlockGrid, kept: Tensor) -> Tensor:
    """Select frames of the tokens of a grid, which are axis 2."""
    kept = kept.to(x.device, non_blocking=True)  # a mask may be on the host, where reading is free
    return x.unflatten(2, (grid.grid[0], -1)).index_select(2, kept).flatten(2, 3)


def attend_own_frame(call: Call, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from dropped frames of a prefill to text and themselves.

    Nobody reads these rows; they only have to stay finite.

    Returns:
        Output `[B, H, lost * Y * X, D]` and log-sum-exp `[B, H, lost * Y * X]`.
    """
    frames, batch, heads = call.q_grid.grid[0], call.q.shape[0], call.q.shape[1]
    number = call.candidate

    def of_each_frame(parts: list[Tensor]) -> Tensor:
        """Join the keys that each frame sees, `[B, H, lost, keys, ..]`."""
        joined = []
        for n, x in enumerate(parts):
            if n == number:
                joined.append(x.unflatten(2, (frames, -1)).index_select(2, lost))
            else:
                shape = (batch, heads, lost.numel(), *x.shape[2:])
                joined.append(x[:, :, None].expand(shape))
        return torch.cat(joined, 3)

    k, v = (of_each_frame(parts).flatten(1, 2) for parts in (call.k, call.v))
    q = call.q.unflatten(2, (frames, -1)).index_select(2, lost).flatten(1, 2)
    shift = None
    if call.key_bias is not None:
        bias = call.key_bias.expand(batch, heads, -1)
        tokens = [segment.grid.tokens for segment in call.layout.segments]
        shift = of_each_frame(list(bias.split(tokens, 2))).flatten(1, 2)[:, :, None]
    out, lse = attend_plainly(q, k, v, call.scale, shift)
    return out.unflatten(1, (heads, -1)).flatten(2, 3), lse.unflatten(1, (heads, -1)).flatten(2)
