"""Plan a chunk as the paper's release does, for the model that the options name."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.options import ContextOptions, StepOptions
from lipass.policy import reference_matrixgame as matrixgame
from lipass.policy import reference_worldplay as worldplay
from lipass.policy.context import ContextPlan, FrameDecision
from lipass.policy.revisit import Revisit

_CONDITIONING_LATENTS = 4


def plan_as_released(
    poses: Tensor,
    query: Tensor,
    context: ContextOptions | None,
    steps: StepOptions | None,
    planned: ContextPlan | None,
    revisit: Revisit | None,
) -> tuple[ContextPlan | None, Revisit | None]:
    """Decide what the options leave to the released gates; the rest stays as it was planned.

    Args:
        poses: `[M, 4, 4]` of the history, one a latent; in mode "matrix-game" one a video frame.
        query: `[q, 4, 4]` of what is generated, likewise.
        context: options of the context, or None.
        steps: options of the steps, or None.
        planned: the context so far.
        revisit: the decision about steps so far.

    Raises:
        ValueError: in mode "matrix-game", cameras that are not those of whole clips.
    """
    modes = {options.mode for options in (context, steps) if options is not None}
    if "reference" in modes:
        gate = _worldplay_gate(poses, query, context, steps)
        if context and context.mode == "reference":
            planned = _worldplay_context(gate, len(poses), context)
        if steps and steps.mode == "reference":
            revisit = _worldplay_revisit(gate, steps)
    if "matrix-game" in modes:
        clip = _clip(len(poses), len(query))
        if context and context.mode == "matrix-game":
            planned = _matrixgame_context(poses, query, clip, context)
        if steps and steps.mode == "matrix-game":
            revisit = _matrixgame_revisit(poses, query, clip, steps)
    return planned, revisit


def history_latents(cameras: int, mode: str) -> int:
    """Return how many latents a history has by its cameras: one each, or one of 4 video frames."""
    return (cameras + 3) // 4 if mode == "matrix-game" else cameras


def _clip(history: int, new: int) -> int:
    """Return the number of a clip of Matrix-Game by its video frames."""
    first, each = matrixgame.FIRST_CLIP_FRAMES, matrixgame.NEW_FRAMES
    if (history, new) == (0, first):
        return 0
    clip, rest = divmod(history - first, each)
    if new != each or clip < 0 or rest:
        raise ValueError(
            f"mode 'matrix-game' plans clips by the cameras of video frames, {first} of the first "
            f"and {each} of each later one, got {new} new ones behind {history}; pass a camera a "
            "frame, or use mode 'adaptive'"
        )
    return clip + 1


def _matrixgame_context(
    poses: Tensor, query: Tensor, clip: int, options: ContextOptions
) -> ContextPlan:
    """Keep the memory of the gate and the latents that condition the clip."""
    gate = matrixgame.gate_clip(torch.cat([poses, query]), clip, options.overlap_min)
    history = history_latents(len(poses), "matrix-game")
    score = min(gate.confidences, default=None)
    frames = []
    for index in range(history):
        if index >= history - _CONDITIONING_LATENTS:
            reason = "window: it conditions the clip"
        elif index in gate.latents:
            reason = "memory of the released gate"
        else:
            reason = "dropped: the released gate did not pick it"
        kept = not reason.startswith("dropped")
        frames.append(FrameDecision(index, kept, reason, score if "memory" in reason else None))
    return ContextPlan(tuple(frames), None, None)


def _matrixgame_revisit(poses: Tensor, query: Tensor, clip: int, options: StepOptions) -> Revisit:
    gate = matrixgame.gate_clip(torch.cat([poses, query]), clip, options.overlap_min)
    if not gate.confidences:
        return Revisit(False, None, None, "the release has no candidates yet")
    score = min(gate.confidences)
    sign = ">=" if gate.reuse else "<"
    reason = f"least confidence {score:.2f} {sign} {options.overlap_min:.2f}"
    return Revisit(gate.reuse, round(score, 4), None, reason)


def _worldplay_gate(
    poses: Tensor, query: Tensor, context: ContextOptions | None, steps: StepOptions | None
) -> worldplay.WorldPlayGate:
    view = context or steps
    assert view is not None
    if context is not None and context.mode == "reference":
        temporal = context.window_chunks_max * context.chunk_latents
        total = context.sink_latents + context.memory_latents + temporal
        sink, threshold = context.sink_latents, context.overlap_min
    else:
        # The release's preset `cache`: upstream's context, nothing filtered.
        temporal, total = worldplay.CACHE_TEMPORAL_LATENTS, worldplay.CACHE_CONTEXT_LATENTS
        sink, threshold = worldplay.SINK_LATENTS, 0.0
    return worldplay.gate_chunk(
        poses,
        query,
        context_latents=total,
        temporal_latents=temporal,
        sink_latents=sink,
        clip_latents=view.chunk_latents,
        context_threshold=threshold,
        reuse_threshold=steps.overlap_min if steps is not None else worldplay.THRESHOLD,
        hfov_deg=view.hfov_deg,
        vfov_deg=view.vfov_deg,
        radius=view.far,
    )


def _worldplay_context(
    gate: worldplay.WorldPlayGate, history: int, options: ContextOptions
) -> ContextPlan:
    kept = set(gate.indices)
    window_from = history - options.window_chunks_max * options.chunk_latents
    frames = []
    for index in range(history):
        score = gate.scores.get(index - index % options.chunk_latents)
        if index < options.sink_latents:
            reason, score = "sink", None
        elif index >= window_from:
            reason, score = "window", None
        elif not gate.scores:
            reason = "kept: the context is not full yet"
        elif index in kept:
            reason = f"memory {score:.2f}"
        elif not gate.retrieved:
            reason = f"dropped: overlap {gate.best:.2f} < {options.overlap_min:.2f}"
        else:
            reason = f"dropped: clip {gate.retrieved[0]} shows more"
        frames.append(FrameDecision(index, index in kept, reason, score))
    return ContextPlan(tuple(frames), options.window_chunks_max, None)


def _worldplay_revisit(gate: worldplay.WorldPlayGate, options: StepOptions) -> Revisit:
    if gate.best is None:
        return Revisit(False, None, None, "the release has no candidates yet")
    latent = max(gate.scores, key=lambda start: gate.scores[start])
    sign = ">=" if gate.reuse else "<"
    reason = f"similarity {gate.best:.2f} {sign} {options.overlap_min:.2f}, clip {latent}"
    return Revisit(gate.reuse, round(gate.best, 4), latent, reason)
