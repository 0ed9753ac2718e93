"""Say which chunk a full cache can spare: the one whose views the others show best.

A cache of fixed size gives up a chunk for each that comes. The oldest is the usual choice, and the
wrong one where a walk comes back. Here each chunk is asked how much of its view no other chunk
shows, with the same points as in the choice of memory (`lipass.policy.context`); the one that
shows least of its own goes. Of equals the latest goes: it has drifted most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.view_overlap.api import point_visibility
from lipass.options import ContextOptions


def least_needed(w2c: Tensor, options: ContextOptions) -> int:
    """Choose the chunk to give up; sink and window are not given up.

    A chunk is judged by the latent in its middle.

    Args:
        w2c: `[n, 4, 4]` cameras on the CPU of what the cache holds, oldest first, whole chunks.
        options: the camera, lengths of chunk, sink and window, and `gain_min`, below which what
            two chunks show of their own is equal.

    Returns:
        Position of the chunk's first latent in `w2c`.

    Raises:
        ValueError: no whole chunks, or none beside sink and window.
    """
    length = options.chunk_latents
    if len(w2c) % length:
        raise ValueError(
            f"a cache must hold whole chunks of {length} latents, got {len(w2c)} cameras; set "
            "chunk_latents, or pass the cameras of what is held only"
        )
    first = -(-options.sink_latents // length)
    window = options.window_latents
    recent = options.window_chunks_max if window is None else -(-window // length)
    last = len(w2c) // length - recent
    if last <= first:
        raise ValueError(
            f"a cache that gives up chunks must hold more than the sink ({first} chunks) and the "
            f"window ({recent}), got {len(w2c) // length}; hold more chunks, or set "
            "context.window_chunks_max"
        )
    middles = w2c[length // 2 :: length]
    camera = options.hfov_deg, options.vfov_deg, options.near, options.far
    seen = point_visibility(middles[first:last], middles, *camera)  # [chunks, held, P]
    each = torch.arange(last - first)
    seen[each, first + each] = 0.0
    alone = (1 - seen.amax(1)).mean(-1)
    spared = (alone <= alone.min() + options.gain_min).nonzero()[-1]
    return (first + int(spared)) * length
