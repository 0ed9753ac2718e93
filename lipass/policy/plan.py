"""Take all decisions of one chunk at once, as plain data that can be stored and replayed."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lipass.config import Config
from lipass.options import ContextOptions
from lipass.policy.blend import Blend
from lipass.policy.blocks import dense_chunk
from lipass.policy.context import ContextPlan, among, keep, plan_context, plan_window
from lipass.policy.indices import indices_of
from lipass.policy.latents import LatentReading, read_latents
from lipass.policy.reference import history_latents, plan_as_released
from lipass.policy.revisit import Revisit, decide_revisit
from lipass.policy.steps import StepPlan
from lipass.policy.views import score_points

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ChunkPlan:
    """The decisions of one chunk; needs neither a GPU nor the model to be made or replayed.

    Attributes:
        stream: name of the stream (one request) that the chunk belongs to.
        index: chunks of the stream before this one.
        context: which history latents the model reads.
        revisit: whether denoising steps may be reused.
        steps: which steps compute; None until `Chunk.steps` has told how many there are.
        dense_reason: why attention stays dense in this chunk; None where the budgets decide.
        steering: what its prompt is made of; None where the session was told none.
        point: of the frontier, at which it was made; None where the session has no target.
    """

    stream: str
    index: int
    context: ContextPlan
    revisit: Revisit
    steps: StepPlan | None
    dense_reason: str | None
    steering: Blend | None = None
    point: str | None = None

    @property
    def history_latents(self) -> int:
        """Latents to choose from."""
        return len(self.context.frames)

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `from_dict` takes it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "stream": self.stream,
            "index": self.index,
            "context": self.context.to_dict(),
            "revisit": self.revisit.to_dict(),
            "steps": None if self.steps is None else self.steps.to_dict(),
            "dense_reason": self.dense_reason,
            "steering": None if self.steering is None else self.steering.to_dict(),
            "point": self.point,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChunkPlan:
        """Rebuild a plan from `to_dict`.

        Raises:
            ValueError: written by another version of the format.
        """
        if not isinstance(data, dict):
            raise TypeError(
                f"a chunk plan must be the dict of `to_dict`, got {type(data).__name__}; pass one "
                "plan at a time"
            )
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"a chunk plan must have schema_version {SCHEMA_VERSION}, got "
                f"{data.get('schema_version')}; record it again with this version of lipass"
            )
        return cls(
            data["stream"],
            data["index"],
            ContextPlan.from_dict(data["context"]),
            Revisit(**data["revisit"]),
            None if data["steps"] is None else StepPlan.from_dict(data["steps"]),
            data["dense_reason"],
            Blend.from_dict(data["steering"]) if data.get("steering") else None,
            data.get("point"),
        )

    def to_json(self) -> str:
        """Give the plan as one JSON document."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ChunkPlan:
        """Rebuild a plan from `to_json`."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"a chunk plan must be the JSON of `to_json`, got {text[:40]!r}: {error}; record "
                "it again"
            ) from None
        return cls.from_dict(data)


class Once(dict[str, Any]):
    """Keep what several plans of one chunk share, so that it is scored and read once."""

    def get_or(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made under a name, or make it."""
        if name not in self:
            self[name] = make()
        return self[name]


def plan_chunk(
    config: Config,
    *,
    poses: Tensor | None,
    query: Tensor | None,
    latents: Tensor | None,
    own_context: Sequence[int] | None,
    stream: str,
    index: int,
    held: Sequence[int] | None = None,
    once: Once | None = None,
) -> ChunkPlan:
    """Decide everything about one chunk.

    Args:
        config: options of the policies.
        poses: `[M, 4, 4]` cameras of the history from `check_poses`, M may be 0; None where
            there are no cameras.
        query: `[q, 4, 4]` cameras of the latents to generate, from `check_poses`; or None.
        latents: `[M, ...]` history, for the latent dynamics; or None.
        own_context: what the loop reads without a context policy; None is all of the history.
        stream: name of the stream.
        index: chunks of the stream before this one.
        held: what there is to choose from; None is all of the history.
        once: what several calls for one chunk share, with other options of the same camera.

    Raises:
        TypeError: cameras or latents of the wrong kind.
        ValueError: cameras, latents or `own_context` that do not fit together.
    """
    context_options, step_options = config.context, config.steps
    once = Once() if once is None else once
    if poses is None or query is None:
        return _without_cameras(config, latents, own_context, stream, index, held, once)
    modes = {options.mode for options in (context_options, step_options) if options}
    counted = "matrix-game" if "matrix-game" in modes else ""
    history, new = (history_latents(len(cameras), counted) for cameras in (poses, query))
    held = None if held is None else indices_of(held, history, "held")
    context: ContextPlan | None = None
    revisit: Revisit | None = None

    adaptive = [o for o in (context_options, step_options) if o and o.mode == "adaptive"]
    if adaptive and history and (held is None or held):
        there = range(history) if held is None else sorted(held)
        scored = functools.partial(score_points, poses[list(there)], query, adaptive[0])
        visibility = once.get_or("points", scored)
        if context_options in adaptive:
            asked = context_options.window_latents is None
            read = _read(once, latents, history, context_options) if asked else None
            context = plan_context(visibility, read, context_options, there, history)
        if step_options in adaptive:
            revisit = decide_revisit(visibility.mean(-1), step_options, there)
    if modes - {"adaptive"}:
        context, revisit = plan_as_released(
            poses, query, context_options, step_options, context, revisit
        )
    if step_options is None:
        revisit = Revisit(False, None, None, "step policy is off")
    # The last chunk may be shorter than those before it.
    length = new if counted or context_options is None else context_options.chunk_latents
    if context is not None and held is not None and modes - {"adaptive"}:
        context = among(context, held)
    if context is None:
        own = held if own_context is None else own_context
        context = keep(history, own, "held" if own_context is None else "own_context")
    elif own_context is not None:
        indices_of(own_context, history, "own_context")
    return ChunkPlan(
        stream=stream,
        index=index,
        context=context,
        revisit=revisit or Revisit(False, None, None, "no history"),
        steps=None,
        dense_reason=dense_chunk(config.sparse, history // length),
    )


def _without_cameras(
    config: Config,
    latents: Tensor | None,
    own_context: Sequence[int] | None,
    stream: str,
    index: int,
    held: Sequence[int] | None,
    once: Once,
) -> ChunkPlan:
    history = 0 if latents is None else len(latents)
    held = None if held is None else indices_of(held, history, "held")
    context, steps = config.context, config.steps
    modes = {options.mode for options in (context, steps) if options} - {"adaptive"}
    if modes:
        raise ValueError(
            f"mode {modes.pop()!r} chooses by cameras, got none; pass query=[q, 4, 4], or use "
            "mode 'adaptive'"
        )
    own = held if own_context is None else own_context
    chosen = keep(history, own, "held" if own_context is None else "own_context")
    if context is not None and latents is not None:
        asked = context.window_latents is None
        read = _read(once, latents, history, context) if asked else LatentReading()
        there = None if held is None else sorted(held)
        chosen = plan_window(history, read, context, there)
    revisit = Revisit(False, None, None, "no cameras, so no view is known to be seen again")
    if steps is None:
        revisit = Revisit(False, None, None, "step policy is off")
    elif history == 0:
        revisit = Revisit(False, None, None, "no history")
    elif steps.overlap_min == 0:
        revisit = Revisit(True, None, None, "steps.overlap_min is 0")
    return ChunkPlan(
        stream=stream,
        index=index,
        context=chosen,
        revisit=revisit,
        steps=None,
        dense_reason=dense_chunk(config.sparse, index),
    )


def _read(
    once: Once, latents: Tensor | None, history: int, options: ContextOptions
) -> LatentReading:
    read = functools.partial(read_latents, latents, history, options.chunk_latents)
    found: LatentReading = once.get_or("latents", read)
    return found


def with_steps(plan: ChunkPlan, steps: StepPlan) -> ChunkPlan:
    """Complete a plan once the number of denoising steps is known."""
    return dataclasses.replace(plan, steps=steps)
