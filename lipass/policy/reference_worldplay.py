"""Reproduce the released gates for HY-WorldPlay, flaws included, to compare ours with them.

Per chunk, with `cur` history latents: the first 4 latents (sink) and the latest
`temporal_latents` are kept; earlier clips of 4 latents, starting at 4, 8, ..., are scored against
the new views, and the best one joins if it reaches the threshold. The same best score decides
whether denoising steps are reused. While `cur < memory_latents` everything is kept, unscored.

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
ALL_MEMORY_LATENTS, ALL_TEMPORAL_LATENTS = 12, 4
CACHE_MEMORY_LATENTS, CACHE_TEMPORAL_LATENTS = 20, 12

# 2,880 points, about as many as the release has inside a view.
_AZIMUTHS, _ELEVATIONS, _DISTANCES = 20, 12, 12


@dataclass(frozen=True)
class WorldPlayGate:
    """What the release decides for one chunk.

    Attributes:
        indices: kept latents, ascending.
        scores: candidate clip start -> score; empty while everything is kept.
        retrieved: start of the clip that joins; None without one.
        reuse: denoising steps may be reused.
    """

    indices: tuple[int, ...]
    scores: dict[int, float]
    retrieved: int | None
    reuse: bool

    @property
    def best(self) -> float | None:
        """Highest score; None without candidates."""
        return max(self.scores.values(), default=None)


def gate_chunk(
    poses: Tensor,
    query: Tensor,
    *,
    memory_latents: int = ALL_MEMORY_LATENTS,
    temporal_latents: int = ALL_TEMPORAL_LATENTS,
    context_threshold: float | None = THRESHOLD,
    reuse_threshold: float = THRESHOLD,
    hfov_deg: float = HFOV_DEG,
    vfov_deg: float = VFOV_DEG,
    radius: float = RADIUS,
) -> WorldPlayGate:
    """Decide context and reuse for the chunk that follows `poses`.

    Args:
        poses: `[M, 4, 4]` float64 world-to-camera matrices of the history.
        query: `[q, 4, 4]` of the new latents.
        memory_latents: latents of a full context, sink and retrieved clip included.
        temporal_latents: latest latents, always kept.
        context_threshold: the best clip joins from this score on; None lets it join always.
        reuse_threshold: steps are reused from this score on.
        hfov_deg: full horizontal field of view, degrees.
        vfov_deg: full vertical field of view, degrees.
        radius: distance up to which a view is considered, in the unit of the poses.
    """
    current = len(poses)
    starts = range(CLIP_LATENTS, current - temporal_latents, CLIP_LATENTS)
    if current < memory_latents or not starts:
        return WorldPlayGate(tuple(range(current)), {}, None, False)
    scores = {}
    for start in starts:
        pair = poses[[start, min(start + CLIP_LATENTS // 2, current - 1)]]
        overlap = view_similarity(query, pair, hfov_deg, vfov_deg, radius)
        scores[start] = float(overlap.mean())
    best = max(scores, key=lambda start: scores[start])
    joins = context_threshold is None or scores[best] >= context_threshold
    kept = {*range(SINK_LATENTS), *range(current - temporal_latents, current)}
    if joins and memory_latents - temporal_latents > SINK_LATENTS:
        kept |= set(range(best, min(best + CLIP_LATENTS, current)))
    return WorldPlayGate(
        tuple(sorted(kept)), scores, best if joins else None, scores[best] >= reuse_threshold
    )


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
    forward = turn[..., 2, :]  # memory's forward axis in the query's frame
    centre = -(turn.transpose(-1, -2) @ shift[..., None])[..., 0]
    azimuth, elevation = _angles(points - centre[..., None, :])
    yaw, pitch = _angles(forward)
    inside = (
        (_wrap(azimuth - yaw[..., None]).abs() < hfov_deg / 2)
        & (_wrap(elevation - pitch[..., None]).abs() < vfov_deg / 2)
        & ((points - centre[..., None, :]).norm(dim=-1) < radius)
    )
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


def _angles(direction: Tensor) -> tuple[Tensor, Tensor]:
    """Azimuth and elevation, degrees; elevation grows along +y, which points down."""
    x, y, z = direction.unbind(-1)
    return torch.rad2deg(torch.atan2(x, z)), torch.rad2deg(torch.atan2(y, torch.hypot(x, z)))


def _wrap(degrees: Tensor) -> Tensor:
    return torch.remainder(degrees + 180, 360) - 180
