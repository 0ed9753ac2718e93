"""Measure a rollout: all figures that what is known of it allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lipass.quality import checks
from lipass.quality.geometry import Space, consistency, followed
from lipass.quality.intervals import percentile
from lipass.quality.pictures import (
    affected,
    latent_error,
    psnr_db,
    psnr_each_db,
    ssim,
    ssim_each,
)
from lipass.quality.videos import drift, loop_score, returns, seams, slope

# Of a walk of 64 chunks a segment is eight of them.
_SEGMENTS_MOST, _SEGMENTS_LEAST, _FRAMES_OF_A_SEGMENT = 8, 2, 8


@dataclass(frozen=True)
class Scene:
    """What a rollout is to show.

    Args:
        w2c: cameras of all frames `[F, 4, 4]`, world to camera, OpenCV axes.
        given: frames of them that are recorded.
        chunk: frames that are generated at once, 1 or more.
        truth: what a renderer or a film shows `[F, C, H, W]` in 0..1; None where nobody knows.
        space: true depth, for what geometry tells; None where nobody knows.
    """

    w2c: Tensor
    given: int
    chunk: int
    truth: Tensor | None = field(default=None, repr=False)
    space: Space | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Rollout:
    """What a method made of a scene.

    Args:
        frames: all of them `[F, C, H, W]` in 0..1, recorded ones as the model shows them.
        latents: generated latents, of any shape.
        chunk_s: seconds of each generated chunk, in the order of time.
        figures: what else is to be written down, by name.
    """

    frames: Tensor = field(repr=False)
    latents: Tensor | None = field(default=None, repr=False)
    chunk_s: Sequence[float] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


class Metric(NamedTuple):
    """One figure: what it is called, in which direction it is better, and how it is shown.

    Attributes:
        title: for the head of a column.
        better: "more", "less", or "" where that is no question of quality.
        digits: behind the point.
        scale: what it is multiplied by to be shown.
    """

    title: str
    better: str
    digits: int
    scale: float = 1.0


METRICS = {
    "psnr_vs_off_db": Metric("PSNR to dense, dB", "more", 1),
    "psnr_vs_off_affected_db": Metric("PSNR to dense, chunks that differ, dB", "more", 1),
    "psnr_vs_off_worst_db": Metric("PSNR to dense, worst chunk, dB", "more", 1),
    "ssim_vs_off": Metric("SSIM to dense", "more", 3),
    "ssim_vs_off_affected": Metric("SSIM to dense, chunks that differ", "more", 3),
    "ssim_vs_off_worst": Metric("SSIM to dense, worst chunk", "more", 3),
    "latent_error_vs_off": Metric("relative error of latents", "less", 3),
    "psnr_vs_truth_db": Metric("PSNR to the truth, dB", "more", 1),
    "ssim_vs_truth": Metric("SSIM to the truth", "more", 3),
    "loop_score": Metric("gated loop score", "more", 3),
    "drift_db": Metric("largest drift, dB", "less", 2),
    "drift_slope_db": Metric("drift a segment, dB", "more", 2),
    "seam": Metric("seams over inside", "less", 2),
    "seam_worst": Metric("worst seam over inside", "less", 2),
    "photometric_db": Metric("photometric consistency, dB", "more", 1),
    "geometric_px": Metric("geometric error, px", "less", 2),
    "followed": Metric("camera followed", "more", 2),
    "speedup_vs_off": Metric("speed", "more", 2),
    "chunk_s_p50": Metric("chunk p50, s", "less", 3),
    "chunk_s_p95": Metric("chunk p95, s", "less", 3),
    "chunk_s_slope": Metric("chunk time, % a chunk", "less", 2),
    "latency_s_p50": Metric("action to frame p50, s", "less", 3),
    "latency_s_p95": Metric("action to frame p95, s", "less", 3),
    "kv_bytes_peak": Metric("keys and values, MB", "", 1, 1e-6),
    "context_latents_mean": Metric("latents read", "", 1),
    "steps_per_chunk": Metric("steps a chunk", "", 1),
    "density": Metric("blocks visited", "", 2),
    "kept_mass": Metric("attention kept (sampled)", "more", 3),
    "recompiles": Metric("recompilations", "less", 0),
}


def measure(
    rollout: Rollout, scene: Scene, dense: Rollout | None = None
) -> dict[str, float | None]:
    """Measure a rollout; only generated frames count.

    Args:
        rollout: what a method made.
        scene: of what.
        dense: what the dense model made of it with the same noise; without, nothing is compared
            with it.

    Returns:
        Figures by the names of `METRICS`; None where there is no such figure, as of a video that
        never comes back, and for all that looks at pictures where some are no numbers or, beside
        a dense model whose pictures are in range, far out of it.

    Raises:
        ValueError: shapes that do not fit together, pictures of the dense model that are no
            numbers or out of range, or pictures out of range with nothing beside them.
    """
    _check(scene, len(rollout.frames))
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    found |= _times(rollout, dense)
    found |= {name: float(value) for name, value in rollout.figures.items()}
    found |= _of_pictures(rollout, scene, dense)
    return {
        name: None if value is None or not math.isfinite(value) else value
        for name, value in found.items()
    }


def _of_pictures(rollout: Rollout, scene: Scene, dense: Rollout | None) -> dict[str, float | None]:
    if dense is not None:
        checks.pictures(dense.frames, "frames of the dense model")
        if checks.broken(rollout.frames, "frames").any():
            return {}
    elif not checks.is_finite(rollout.frames):
        return {}
    frames, made = rollout.frames, rollout.frames[scene.given :]
    pairs = returns(checks.cameras(scene.w2c, len(frames)), scene.given)
    found: dict[str, float | None] = {}
    found["loop_score"] = loop_score(frames, pairs)
    if (jumps := seams(frames, scene.chunk, scene.given)) is not None:
        found["seam"], found["seam_worst"] = jumps.mean, jumps.most
    if scene.truth is not None:
        found |= _to_truth(made, scene.truth[scene.given :])
    if scene.space is not None:
        found |= _in_space(frames, scene)
    if dense is not None:
        found |= _to_dense(made, dense.frames[scene.given :], scene.chunk)
        found["latent_error_vs_off"] = _latent_error(rollout.latents, dense.latents)
    return found


def _latent_error(made: Tensor | None, wanted: Tensor | None) -> float | None:
    if made is None or wanted is None or not wanted.any():
        return None
    known = checks.is_finite(made) and checks.is_finite(wanted)
    return latent_error(made, wanted) if known else None


def _check(scene: Scene, frames: int) -> None:
    checks.whole(scene.chunk, "chunk")
    if checks.whole(scene.given, "given", 0) >= frames:
        raise ValueError(
            f"a scene must leave frames to be generated, got given={scene.given} of {frames}; "
            "count the recorded ones only"
        )


def _times(rollout: Rollout, dense: Rollout | None) -> dict[str, float | None]:
    seconds = [float(one) for one in rollout.chunk_s]
    if not seconds:
        return {}
    found: dict[str, float | None] = {
        "chunk_s_p50": percentile(seconds, 0.5),
        "chunk_s_p95": percentile(seconds, 0.95),
    }
    if (mean := statistics.fmean(seconds)) > 0:
        found["chunk_s_slope"] = 100 * slope(seconds) / mean
    theirs = [] if dense is None else [float(one) for one in dense.chunk_s]
    # A chunk that took no time was not timed, and a median of the others would be another one.
    if len(theirs) == len(seconds) and all(one > 0 for one in (*theirs, *seconds)):
        ratios = [slow / fast for slow, fast in zip(theirs, seconds, strict=True)]
        found["speedup_vs_off"] = statistics.median(ratios)
    return found


def _to_truth(made: Tensor, truth: Tensor) -> dict[str, float | None]:
    made, truth = checks.alike(made, truth, ("frames", "truth"))
    found: dict[str, float | None] = {
        "psnr_vs_truth_db": psnr_db(made, truth),
        "ssim_vs_truth": ssim(made, truth),
    }
    segments = min(_SEGMENTS_MOST, len(made) // _FRAMES_OF_A_SEGMENT)
    along = drift(made, truth, max(segments, _SEGMENTS_LEAST))
    if along is not None:
        found |= {"drift_db": along.most_db, "drift_slope_db": along.slope_db}
    return found


def _in_space(frames: Tensor, scene: Scene) -> dict[str, float | None]:
    assert scene.space is not None
    first = max(scene.given, 1)
    found: dict[str, float | None] = {
        "followed": followed(frames, scene.space, first_generated=first)
    }
    rigid = consistency(frames, scene.space, gap=scene.chunk, first_generated=first)
    if rigid is not None:
        found |= {"photometric_db": rigid.photometric_db, "geometric_px": rigid.geometric_px}
    return found


def _to_dense(made: Tensor, wanted: Tensor, chunk: int) -> dict[str, float | None]:
    differs = affected(made, wanted, chunk)
    found: dict[str, float | None] = {
        "psnr_vs_off_db": psnr_db(made, wanted),
        "psnr_vs_off_worst_db": min(_by_chunk_db(made, wanted, chunk)),
    }
    similar = ssim_each(made, wanted)
    found["ssim_vs_off"] = float(similar.mean())
    found["ssim_vs_off_worst"] = min(float(part.mean()) for part in similar.split(chunk))
    found["psnr_vs_off_affected_db"] = found["psnr_vs_off_db"]
    found["ssim_vs_off_affected"] = found["ssim_vs_off"]
    if differs.any():
        found["psnr_vs_off_affected_db"] = psnr_db(made[differs], wanted[differs])
        found["ssim_vs_off_affected"] = float(similar[differs].mean())
    return found


def _by_chunk_db(made: Tensor, wanted: Tensor, chunk: int) -> list[float]:
    pairs = zip(made.split(chunk), wanted.split(chunk), strict=True)
    return [psnr_db(*pair) for pair in pairs]


def worst_and_typical(rollout: Rollout, wanted: Tensor, scene: Scene) -> tuple[int, int]:
    """Choose frames of the video, in `[F]`, that stand for it.

    Returns:
        Of the worst chunk, whose PSNR to `wanted` is what a verdict is about, the frame that is
        furthest from `wanted`; and the one in the middle of all.
    """
    made, wanted = rollout.frames[scene.given :], wanted[scene.given :]
    near, chunks = psnr_each_db(made, wanted), _by_chunk_db(made, wanted, scene.chunk)
    start = scene.chunk * chunks.index(min(chunks))
    worst = start + int(near[start : start + scene.chunk].argmin())
    return scene.given + worst, scene.given + int(near.argsort()[len(near) // 2])
