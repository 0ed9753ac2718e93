"""What a whole walk shows: does it come back, does it get worse, and are its seams seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipass.policy.convention import inverted
from lipass.quality import checks
from lipass.quality.pictures import psnr_db, ssim_each

# Of WBench: similarity must fall by this much on the way for a return to count in full.
GATE = 0.15
_ON_THE_WAY = 10
_PAIRS_MOST = 32


def returns(
    w2c: Tensor,
    first_generated: int = 0,
    *,
    gap: int = 8,
    near: float = 0.02,
    turn_deg: float = 0.5,
) -> list[tuple[int, int]]:
    """Pairs (earlier, again) of frames that look from the same place the same way.

    Args:
        w2c: cameras `[F, 4, 4]`, world to camera.
        first_generated: frames before it are recorded, and return nowhere.
        gap: frames that lie between at least.
        near: distance that counts as none, in the unit of the cameras.
        turn_deg: turn that counts as none, about any axis.

    Returns:
        For each generated frame that has been seen, the earliest such view and itself, where the
        camera looked elsewhere on the way; a camera that pauses does not come back.
    """
    c2w = inverted(w2c)
    close = (c2w[:, None, :3, 3] - c2w[None, :, :3, 3]).norm(dim=-1) < near
    axes = c2w[:, :3, :3].flatten(1).double()
    cosine = (axes @ axes.T - 1) / 2  # of the whole turn between two views, roll included
    same = close & (cosine > math.cos(math.radians(turn_deg)))
    pairs = []
    for again in range(first_generated, len(w2c)):
        earlier = same[: max(again - gap + 1, 0), again].nonzero()
        if len(earlier) and not same[int(earlier[0]) : again, again].all():
            pairs.append((int(earlier[0]), again))
    return pairs


def loop_score(frames: Tensor, pairs: Sequence[tuple[int, int]]) -> float | None:
    """Gated similarity of places with themselves when the camera comes back, in 0..1.

    Source: WBench (meituan-longcat/WBench), spatial consistency: similarity at the return times
    `min(1, (1 - lowest similarity on the way) / 0.15)`, the lowest of ten frames on the way there;
    so a video that hardly moves gets nothing for looking the same. Differs in: similarity is SSIM
    (0 where it is negative) in place of `1 / (1 + DreamSim)`, and the mean over all returns is
    taken in place of the one return of a symmetric list of actions.

    Args:
        frames: the video `[F, C, H, W]` in 0..1, recorded frames included.
        pairs: frames that show one place, from `returns`; of many, 32 evenly spaced are looked at.

    Returns:
        The score; None where nothing is returned to.
    """
    frames = checks.pictures(frames, "frames")
    if not pairs:
        return None
    step = -(-len(pairs) // _PAIRS_MOST)
    scores = []
    for first, again in pairs[::step]:
        way = torch.linspace(first, again, _ON_THE_WAY + 1).round().long()[1:]
        shown = frames[way]
        similar = ssim_each(frames[first : first + 1].expand_as(shown), shown).clamp(min=0)
        moved = min(1.0, (1 - float(similar.min())) / GATE)
        scores.append(float(similar[-1]) * moved)
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class Drift:
    """How quality goes along a video.

    Attributes:
        by_segment_db: PSNR of each segment, in the order of time.
        most_db: how much the worst segment lies below the first one, at least 0.
        slope_db: change a segment, of a line fitted to all of them; negative where it gets worse.
    """

    by_segment_db: tuple[float, ...]
    most_db: float
    slope_db: float


def drift(frames: Tensor, truth: Tensor, segments: int = 4) -> Drift | None:
    """Say whether a video gets worse, segment by segment.

    Source: WorldRoamBench (arXiv 2606.31672): start against end misses a collapse in between, so
    the video is cut into segments and the largest loss counts. Quality is PSNR to `truth` here.

    Args:
        frames: generated frames `[F, C, H, W]` in 0..1.
        truth: what they should show, of the same shape.
        segments: pieces of nearly equal length.

    Returns:
        None where there are fewer frames than segments.
    """
    frames, truth = checks.alike(frames, truth, ("frames", "truth"))
    if len(frames) < checks.whole(segments, "segments", 2):
        return None
    pieces = zip(frames.tensor_split(segments), truth.tensor_split(segments), strict=True)
    found = [psnr_db(a, b) for a, b in pieces]
    return Drift(tuple(found), max(0.0, max(found[0] - one for one in found)), slope(found))


def slope(values: Sequence[float]) -> float:
    """Slope of the line fitted to values at 0, 1, 2, ...; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64) - (len(values) - 1) / 2
    return float((x * y).sum() / (x * x).sum())


@dataclass(frozen=True)
class Seams:
    """Differences between frames where chunks begin, over the median difference inside chunks."""

    mean: float
    most: float


def seams(frames: Tensor, chunk: int, first_generated: int = 0) -> Seams | None:
    """Say whether the places are seen where chunks begin.

    Source: Forcing-KV's chunk discontinuity, which takes optical flow; here the mean absolute
    difference of neighbouring frames, at seams over the median of those inside chunks. 1 is a seam
    that nobody sees; a camera that speeds up there counts too, so compare with the dense model.

    Args:
        frames: the video `[F, C, H, W]` in 0..1, recorded frames included.
        chunk: frames a chunk.
        first_generated: where the first generated chunk begins.

    Returns:
        None where no seam lies between frames, or nothing moves inside chunks, as in those of one
        frame.
    """
    frames = checks.pictures(frames, "frames")
    if checks.whole(chunk, "chunk") == 1 or len(frames) == 1:
        return None
    pairs = itertools.pairwise(frames)
    change = torch.stack([(b.double() - a).abs().mean() for a, b in pairs])
    at = torch.arange(1, len(frames))
    generated = at >= first_generated
    begins = generated & ((at - first_generated) % chunk == 0)
    inside = change[generated & ~begins]
    if not begins.any() or not len(inside) or float(inside.median()) == 0:
        return None
    ratios = change[begins] / inside.median()
    return Seams(float(ratios.mean()), float(ratios.max()))
