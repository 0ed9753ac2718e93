"""Reproduce the released gates for Matrix-Game 3.0, flaws included, to compare ours with them.

A clip of 40 new video frames follows 16 conditioning ones. Five reference frames (the last of the
clip and every eighth before it) each pick the earlier frame that shows most of their view; the
fifth pick is then overwritten by frame 4, the sink, but its confidence stays in the cache gate.
Picks below the threshold are dropped, duplicates are not.

Identical views score 0.8, not 1: the nearest and farthest of the ten depth planes fail a strict
comparison. The threshold 0.45 therefore means 56 % of identical.

Source: reading notes on the release of arXiv 2605.31158 (`select_memory_idx_fov`), formulas only.
Differs in: poses are taken in float64. Rounding at the borders of the view, where points of the
grid lie, makes equal-looking views score 0.7 to 0.96 in both, but not with the same digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 0.45
FIRST_CLIP_FRAMES = 57
NEW_FRAMES = 40
# Frames before the end of a clip that may not be picked: 16 conditioning ones and 40 new ones.
_EXCLUDED_FRAMES = 56
_REFERENCE_OFFSETS = (1, 9, 17, 25, 33)
_SINK_FRAME = 4
_NEAR, _FAR, _CELLS = 0.1, 30.0, 10
_WIDTH, _HEIGHT = 1280.0, 720.0
_FOCAL_X, _FOCAL_Y = 640.0, 360.0


@dataclass(frozen=True)
class MatrixGameGate:
    """What the release decides for one clip.

    Attributes:
        frames: picked video frames in the order of their reference frames, the sink last.
        latents: their latent indices, `(frame - 1) // 4 + 1`; may repeat.
        confidences: score of each reference frame's pick; five, or none for the first clip.
        reuse: the middle denoising step may be reused.
    """

    frames: tuple[int, ...]
    latents: tuple[int, ...]
    confidences: tuple[float, ...]
    reuse: bool


def gate_clip(w2c: Tensor, clip: int, threshold: float = THRESHOLD) -> MatrixGameGate:
    """Decide memory and reuse for one clip.

    Args:
        w2c: `[F, 4, 4]` world-to-camera matrices, one a video frame, to the clip's end or beyond.
        clip: 0 is the first one, which has no memory.
        threshold: least confidence.

    Raises:
        ValueError: fewer cameras than the clip has frames.
    """
    end = FIRST_CLIP_FRAMES + NEW_FRAMES * clip
    if len(w2c) < end:
        raise ValueError(
            f"w2c must reach the end of clip {clip}, got {len(w2c)} of {end} frames; "
            "extend the trajectory"
        )
    if clip == 0:
        return MatrixGameGate((), (), (), False)
    w2c = w2c.double()
    candidates = torch.arange(1, end - _EXCLUDED_FRAMES)
    picks, confidences = [], []
    for offset in _REFERENCE_OFFSETS:
        scores = frustum_similarity(w2c[end - offset], w2c[candidates])
        picks.append(int(candidates[scores.argmax()]))
        confidences.append(float(scores.max()))
    kept = [f for f, c in zip(picks[:-1], confidences, strict=False) if c >= threshold]
    frames = (*kept, _SINK_FRAME)
    latents = tuple((frame - 1) // 4 + 1 for frame in frames)
    return MatrixGameGate(frames, latents, tuple(confidences), min(confidences) >= threshold)


def frustum_similarity(reference: Tensor, candidates: Tensor) -> Tensor:
    """Share of a grid in the reference view that each candidate shows, `[4,4], [M,4,4] -> [M]`."""
    side = torch.linspace(-1, 1, _CELLS, dtype=torch.float64)
    depth = torch.linspace(_NEAR, _FAR, _CELLS, dtype=torch.float64)
    x, y, z = torch.meshgrid(side, side, depth, indexing="ij")
    points = torch.stack([x * z, y * z, z], -1).reshape(-1, 3)
    turn = candidates[:, :3, :3] @ reference[:3, :3].T
    shift = candidates[:, :3, 3] - turn @ reference[:3, 3]
    seen = points @ turn.transpose(1, 2) + shift[:, None]
    x, y, z = seen.unbind(-1)
    u = _FOCAL_X * x / z + _WIDTH / 2
    v = _FOCAL_Y * y / z + _HEIGHT / 2
    inside = (z > _NEAR) & (z < _FAR) & (u >= 0) & (u <= _WIDTH) & (v >= 0) & (v <= _HEIGHT)
    return inside.double().mean(1)
