"""Reproduce the released gates for HY-WorldPlay, flaws included, to compare ours with them.

Per chunk, with `cur` history latents: the first 4 latents (sink) and the latest
`temporal_latents` are kept; earlier clips of 4 latents, starting at 4, 8, ..., are scored against
the new views, and the best one joins if it reaches the threshold. The same best score decides
whether denoising steps are reused. While `cur < context_latents` everything is kept, unscored.

The flaws are part of it: walking forward counts as revisiting, returning to the first view does
not (the sink is no candidate), and the gate moves with the window.

Source: reading notes on the release of arXiv 2605.31158 (`retrieval_context`), formulas only.
Differs in: the release draws 50,000 points in a ball from the global random generator, of which
some 2,500 fall into the view (standard error 0.009); here the view is sampled on a fixed grid, so
scores repeat. Gates are equal wherever the release's are not within its own noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HFOV_DEG, VFOV_DEG, RADIUS = 60.0, 35.0, 8.0
CLIP_LATENTS = 4
SINK_LATENTS = 4
THRESHOLD = 0.7

# Context of the release's presets `all` (12 latents, 4 recent) and `cache` (20 latents, 12
# recent).
ALL_CONTEXT_LATENTS, ALL_TEMPORAL_LATENTS = 12, 4
CACHE_CONTEXT_LATENTS, CACHE_TEMPORAL_LATENTS = 20, 12

# 2,880 points, about as many as the release has inside a view.
_AZIMUTHS, _ELEVATIONS, _DISTANCES = 20, 12, 12


@dataclass(frozen=True)
class WorldPlayGate:
    """What the release decides for one chunk.

    Attributes:
        indices: kept latents, ascending.
        scores: candidate clip start -> score; empty while everything is kept.
        retrieved: starts of the clips that join, best first.
        reuse: denoising steps may be reused.
    """

    indices: tuple[int, ...]
    scores: dict[int, float]
    retrieved: tuple[int, ...]
    reuse: bool

    @property
    def best(self) -> float | None:
        """Highest score; None without candidates."""
        return max(self.scores.values(), default=None)


def gate_chunk(
    poses: Tensor,
    query: Tensor,
    *,
    context_latents: int = ALL_CONTEXT_LATENTS,
    temporal_latents: int = ALL_TEMPORAL_LATENTS,
    sink_latents: int = SINK_LATENTS,
    clip_latents: int = CLIP_LATENTS,
    context_threshold: float = THRESHOLD,
    reuse_threshold: float = THRESHOLD,
    hfov_deg: float = HFOV_DEG,
    vfov_deg: float = VFOV_DEG,
    radius: float = RADIUS,
) -> WorldPlayGate:
    """Decide context and reuse for the chunk that follows `poses`.

    Args:
        poses: `[M, 4, 4]` float64 world-to-camera matrices of the history.
        query: `[q, 4, 4]` of the new latents.
        context_latents: latents of a full context: sink, retrieved clips and window.
        temporal_latents: latest latents, always kept.
        sink_latents: first latents, always kept.
        clip_latents: latents retrieved together.
        context_threshold: clips join if the best one scores this; 0 lets them join always.
        reuse_threshold: steps are reused if the best clip scores this.
        hfov_deg: full horizontal field of view, degrees.
        vfov_deg: full vertical field of view, degrees.
        radius: distance up to which a view is considered, in the unit of the poses.
    """
    current = len(poses)
    starts = range(clip_latents, current - temporal_latents, clip_latents)
    if current < context_latents or not starts:
        return WorldPlayGate(tuple(range(current)), {}, (), False)
    first = torch.tensor(starts)
    middle = (first + clip_latents // 2).clamp_max(current - 1)
    both = view_similarity(query, poses[torch.cat([first, middle])], hfov_deg, vfov_deg, radius)
    means = both.mean(0).reshape(2, -1).mean(0)
    scores = dict(zip(starts, means.tolist(), strict=True))
    ranked = sorted(scores, key=lambda start: -scores[start])
    earlier = set(range(sink_latents))
    retrieved = []
    if scores[ranked[0]] >= context_threshold:
        for start in ranked:
            if len(earlier) >= context_latents - temporal_latents:
                break
            earlier |= set(range(start, start + clip_latents))
            retrieved.append(start)
    kept = sorted(earlier | set(range(current - temporal_latents, current)))
    reuse = scores[ranked[0]] >= reuse_threshold
    return WorldPlayGate(tuple(kept), scores, tuple(retrieved), reuse)


def view_similarity(
    query: Tensor, memory: Tensor, hfov_deg: float, vfov_deg: float, radius: float
) -> Tensor:
    """Share of each query view's ball sector that each memory view contains.

    Views are ranges of azimuth and elevation about the forward axis; roll is ignored. A point must
    also lie within `radius` of the memory camera.

    Returns:
        `[Q, M]` in [0, 1].
    """
    points = _sector(hfov_deg, vfov_deg, radius)  # [P, 3], in the query camera's frame
    turn = memory[None, :, :3, :3] @ query[:, None, :3, :3].transpose(-1, -2)
    shift = memory[None, :, :3, 3] - (turn @ query[:, None, :3, 3:])[..., 0]
    centre = -(turn.transpose(-1, -2) @ shift[..., None])[..., 0]
    forward = turn[..., 2, :, None]  # memory's forward axis in the query's frame
    x, y, z = (points - centre[..., None, :]).unbind(-1)

    # |azimuth - yaw| < half: in the frame turned by the yaw, ahead and within the tangent.
    level = torch.hypot(forward[..., 0, :], forward[..., 2, :]).clamp_min(1e-12)
    sine, cosine = forward[..., 0, :] / level, forward[..., 2, :] / level
    ahead = x * sine + z * cosine
    aside = (x * cosine - z * sine).abs()
    inside = aside < ahead * math.tan(math.radians(hfov_deg) / 2)
    # |elevation - pitch| < half: sines compare as angles do between -90 and 90 degrees.
    pitch = torch.atan2(forward[..., 1, :], level)
    half = math.radians(vfov_deg) / 2
    distance = (x * x + y * y + z * z).sqrt()
    inside &= y > distance * (pitch - half).clamp_min(-math.pi / 2).sin()
    inside &= y < distance * (pitch + half).clamp_max(math.pi / 2).sin()
    inside &= distance < radius
    return inside.double().mean(-1)


def _sector(hfov_deg: float, vfov_deg: float, radius: float) -> Tensor:
    """Points of equal volume in the part of the ball that the query views, `[P, 3]`."""
    azimuth = math.radians(hfov_deg) * (_middles(_AZIMUTHS) - 0.5)
    sine = math.sin(math.radians(vfov_deg) / 2) * (2 * _middles(_ELEVATIONS) - 1)
    distance = radius * _middles(_DISTANCES) ** (1 / 3)
    azimuth, sine, distance = torch.meshgrid(azimuth, sine, distance, indexing="ij")
    level = (1 - sine * sine).sqrt()
    point = torch.stack([level * azimuth.sin(), sine, level * azimuth.cos()], -1)
    return (point * distance[..., None]).reshape(-1, 3)


def _middles(cells: int) -> Tensor:
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
