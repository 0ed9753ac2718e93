"""Take dropped frames out of a call before its tokens fall into tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.call import Call
from lipass.kernels.dense import attend_plainly
from lipass.kernels.plan import BlockGrid


def without_frames(call: Call, kept: Tensor) -> Call:
    """Take frames out of the candidate segment, and of the queries in prefill."""
    number = call.candidate
    assert number is not None
    grid = call.layout.segments[number].grid
    k, v = list(call.k), list(call.v)
    k[number], v[number] = pick_frames(k[number], grid, kept), pick_frames(v[number], grid, kept)
    frames = (kept.numel(), *grid.grid[1:])
    layout = call.layout.replace_grid(number, BlockGrid(frames, grid.tile))
    means = call.history_means
    if means is not None:
        # Tiles that span frames are cut anew among those that stay.
        means = pick_frames(means, grid, kept) if grid.tile[0] == 1 else None
    bias = call.key_bias
    if bias is not None:
        parts = list(bias.split([segment.grid.tokens for segment in call.layout.segments], 2))
        parts[number] = pick_frames(parts[number], grid, kept)
        bias = torch.cat(parts, 2)
    call = call._replace(k=k, v=v, layout=layout, history_means=means, key_bias=bias)
    if call.role == "decode":
        return call
    q = pick_frames(call.q, call.q_grid, kept)
    return call._replace(q=q, q_grid=BlockGrid(frames, call.q_grid.tile))


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
