"""Let the clips of a pipeline of Matrix-Game-3.0 ask a session for memory and steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipass.adapters.adoption import Adoption
from lipass.adapters.driving import Driven, DrivenScheduler, module_of, refuse_other_axes
from lipass.errors import LipassError
from lipass.policy.convention import inverted
from lipass.policy.reference_matrixgame import frustum_similarity
from lipass.runtime.chunk import Chunk
from lipass.session import Session

PAST_LATENTS = 4
"""Clean latents in front of the new ones of a clip."""
_FRAMES_A_LATENT = 4
_SINK_LATENT = 1
_CALLED = {
    "build_plucker_from_c2ws": ("rays", "the cameras of the first clip are seen"),
    "select_memory_idx_fov": ("memory", "memory is the session's"),
    "compute_relative_poses": ("relative", "memory is paired with what it shows"),
    "FlowUniPCMultistepScheduler": ("scheduler", "steps are the session's"),
}
"""What the loop calls by name: the method of `_Rollout` in its place, and why."""


def drive(pipeline: Any, session: Session, adoption: Adoption) -> None:
    """Bind what a pipeline's module calls by name; all three of its pipelines call the same.

    Raises:
        LipassError: if a session cannot choose for it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise LipassError(
            "a driven rollout runs in one process, got an initialised process group, in which "
            "the other ranks would not ask the session; run without sequence parallelism"
        )
    module = module_of(pipeline, *_CALLED)
    rollout = _Rollout(session, module)
    adoption.at_undo(rollout.end)
    for name, (method, why) in _CALLED.items():
        adoption.rebind(module, name, getattr(rollout, method), why)


class _Rollout:
    """One rollout that asks one session; the pipeline's own functions are kept beside.

    Video frame 0 is a latent of its own, which the release never remembers; frames `4 n - 3` to
    `4 n` are latent `n`, whose camera is that of the last of them.
    """

    def __init__(self, session: Session, module: Any) -> None:
        self._session, self._stream = session, ""
        self._driven = Driven(session)
        self._build_rays = module.build_plucker_from_c2ws
        self._retrieve = module.select_memory_idx_fov
        self._relate = module.compute_relative_poses
        self._make_scheduler = module.FlowUniPCMultistepScheduler
        modes = {one.mode for one in (session.config.context, session.config.steps) if one}
        self._by_frame = "matrix-game" in modes
        self._clip: Tensor | None = None
        self._references: list[Tensor] = []
        refuse_other_axes(session)

    def end(self) -> None:
        """Close a chunk whose steps were not taken to their end."""
        if self._driven.chunk is not None:
            self._driven.end(LipassError("the rollout ended within a clip"))

    def rays(self, c2w: Tensor, *given: Any, **named: Any) -> Any:
        """Be `build_plucker_from_c2ws`, which each clip calls first, with its own cameras."""
        self.end()  # of one that failed
        self._clip = c2w
        return self._build_rays(c2w, *given, **named)

    def memory(self, c2w: Any, start: int, bases: list[int], *given: Any, **named: Any) -> Any:
        """Be `select_memory_idx_fov`: choose video frames, one a reference frame of the clip."""
        picks = [int(frame) for frame in self._retrieve(c2w, start, list(bases), *given, **named)]
        cameras = torch.as_tensor(c2w).detach().cpu().double()
        end = bases[0] + 1
        new = start + PAST_LATENTS * _FRAMES_A_LATENT
        # The pipeline itself puts the sink in the place of the last pick.
        released = [*map(_latent, picks[:-1]), _SINK_LATENT]
        past = range(_latent(start), _latent(start) + PAST_LATENTS)
        first = 0 if self._by_frame else 1
        chunk = self._begin(
            cameras, new, end, [index - first for index in sorted({*released, *past})]
        )
        if self._session.config.context is None:
            return picks
        chosen = [index + first for index in chunk.context if index + first < past.start]
        if len(chosen) > len(bases):
            raise LipassError(
                f"Matrix-Game-3.0 pairs each memory latent with one of {len(bases)} frames of a "
                f"clip, got {len(chosen)} chosen; set context.memory_latents to at most "
                f"{len(bases) - 1}"
            )
        w2c = inverted(cameras)
        pairs = sorted((self._reference(index, released, bases, w2c), index) for index in chosen)
        self._references = [cameras[bases[place] : bases[place] + 1] for place, _ in pairs]
        return _Kept(_FRAMES_A_LATENT * index for _, index in pairs)

    def relative(self, poses: Tensor, framewise: bool = False, **named: Any) -> Any:
        """Be `compute_relative_poses`: of a memory latent and the reference frame it is for."""
        if self._references and not framewise and len(poses) == 2:
            reference = self._references.pop(0).to(poses)
            poses = torch.cat([reference, poses[1:]])
        return self._relate(poses, framewise=framewise, **named)

    def scheduler(self, *given: Any, **named: Any) -> Any:
        """Be the class of the scheduler, which each clip makes a new one of."""
        return DrivenScheduler(
            self._make_scheduler(*given, **named), self._opened, self._driven.end
        )

    def _opened(self) -> Chunk:
        if self._driven.chunk is not None:
            return self._driven.chunk
        assert self._clip is not None
        cameras = self._clip.detach().cpu().double()
        return self._begin(cameras, 0, len(cameras), None)

    def _begin(self, c2w: Tensor, new: int, end: int, own: list[int] | None) -> Chunk:
        """Open the chunk of the frames from `new` to `end`; the history is all before."""
        if not new:
            self._stream = self._session.turns.fresh()
        if self._by_frame:
            history, query = c2w[:new], c2w[new:end]
        else:
            # Latent 0 has no frames but its own, and is never remembered.
            history = c2w[_FRAMES_A_LATENT:new:_FRAMES_A_LATENT]
            query = c2w[(new + _FRAMES_A_LATENT - 1 if new else 0) : end : _FRAMES_A_LATENT]
        if self._session.given.convention.direction == "w2c":
            history, query = inverted(history), inverted(query)
        return self._driven.begin(
            poses=history if new else None, query=query, own_context=own, stream=self._stream
        )

    def _reference(self, latent: int, released: list[int], bases: list[int], w2c: Tensor) -> int:
        """Return for which reference frame a latent was retrieved, or whose view it shows."""
        if latent in released:
            return released.index(latent) if latent != _SINK_LATENT else len(bases) - 1
        camera = w2c[_FRAMES_A_LATENT * latent][None]
        shares = [float(frustum_similarity(w2c[base], camera)[0]) for base in bases]
        return shares.index(max(shares))


class _Kept(list[int]):
    """Frames that stay as they were chosen: the pipeline writes its sink to the last place."""

    def __setitem__(self, index: Any, value: Any) -> None:
        """Leave everything as it is."""


def _latent(frame: int) -> int:
    return (frame - 1) // _FRAMES_A_LATENT + 1
