"""Let the autoregressive rollout of HY-WorldPlay's pipeline ask a session."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from lipass.adapters.adoption import Adoption
from lipass.adapters.driving import (
    Driven,
    DrivenTimesteps,
    cameras_of,
    module_of,
    refuse_other_axes,
)
from lipass.runtime.chunk import Chunk
from lipass.session import Session

# What the pipeline retrieves together, whatever the length of its chunks.
_RETRIEVED_TOGETHER = 4


def drive(pipeline: Any, session: Session, adoption: Adoption) -> None:
    """Bind context and steps of the rollout to a session.

    The context is chosen where the pipeline retrieves memory frames; latents, conditions, cameras,
    actions and positions follow that list. Steps are those that the loop iterates over.
    """
    module = module_of(pipeline, "select_aligned_memory_frames")
    rollout = _Rollout(pipeline, session, module.select_aligned_memory_frames)
    adoption.rebind(
        module, "select_aligned_memory_frames", rollout.context, "context is the session's"
    )
    adoption.rebind(pipeline, "_ar_rollout_inner", rollout.run, "steps are the session's")


class _Rollout:
    """One pipeline whose rollouts ask one session."""

    def __init__(self, pipeline: Any, session: Session, retrieve: Any) -> None:
        self._pipeline = pipeline
        self._own = pipeline._ar_rollout_inner
        self._retrieve = retrieve
        self._driven = Driven(session)
        self._latents: Tensor | None = None
        self._cameras: Tensor
        self._session, self._stream = session, ""
        refuse_other_axes(session)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Be `_ar_rollout_inner`."""
        bound = inspect.signature(self._own).bind(*args, **kwargs)
        given = bound.arguments
        self._cameras = cameras_of(self._session, given["viewmats"])
        self._latents, self._stream = given["latents"], self._session.turns.fresh()
        scheduler = self._pipeline.scheduler
        given["timesteps"] = DrivenTimesteps(
            given["timesteps"],
            scheduler,
            is_euler=type(scheduler).__name__ == "FlowMatchDiscreteScheduler",
            opened=self._opened,
            done=self._driven.end,
        )
        try:
            return self._own(*bound.args, **bound.kwargs)
        except BaseException as error:
            self._driven.end(error)
            raise
        finally:
            self._driven.end()
            self._latents = None

    def context(self, w2c: Any, first: int, *args: Any, **kwargs: Any) -> list[int]:
        """Be `select_aligned_memory_frames`: asked for each four latents of a chunk."""
        if self._latents is None:  # the bidirectional rollout, which is not driven
            own: list[int] = self._retrieve(w2c, first, *args, **kwargs)
            return own
        length = self._pipeline.chunk_latent_frames
        start = first // length * length
        if self._driven.chunk is None:
            retrieved = {
                frame
                for place in range(start, start + length, _RETRIEVED_TOGETHER)
                for frame in self._retrieve(w2c, place, *args, **kwargs)
                if frame < start
            }
            self._begin(start, sorted(retrieved))
            self._release()
        assert self._driven.chunk is not None
        return self._driven.chunk.context

    def _release(self) -> None:
        """Let go of the last context's keys: the next one is computed without them."""
        for name in ("_kv_cache", "_kv_cache_neg"):
            for layer in getattr(self._pipeline, name, ()):
                layer["k_vision"] = layer["v_vision"] = None

    def _opened(self) -> Chunk:
        return self._driven.chunk or self._begin(0, None)

    def _begin(self, start: int, own_context: list[int] | None) -> Chunk:
        assert self._latents is not None
        end = start + self._pipeline.chunk_latent_frames
        return self._driven.begin(
            poses=self._cameras[:start] if start else None,
            query=self._cameras[start:end],
            latents=self._latents[0, :, :start].transpose(0, 1) if start else None,
            own_context=own_context,
            stream=self._stream,
        )
