"""Follow recorded plans, in order, of any number of streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lipass.config import Config
from lipass.errors import LipassError
from lipass.policy.context import keep
from lipass.policy.indices import indices_of
from lipass.policy.plan import ChunkPlan
from lipass.policy.reference import history_latents
from lipass.policy.revisit import Revisit
from lipass.switch import is_off


class Replay:
    """What is left of a recording.

    Args:
        plans: in order.

    Raises:
        TypeError: something else than plans.
    """

    def __init__(self, plans: Iterable[ChunkPlan]) -> None:
        self._left: dict[str, deque[ChunkPlan]] = {}
        for plan in plans:
            if not isinstance(plan, ChunkPlan):
                raise TypeError(
                    f"a replay takes chunk plans, got {plan!r:.40} of kind {type(plan).__name__}; "
                    "make them with ChunkPlan.from_json(text)"
                )
            self._left.setdefault(plan.stream, deque()).append(plan)

    def next(
        self,
        config: Config,
        stream: str,
        poses: Tensor | None,
        held: Sequence[int] | None = None,
    ) -> ChunkPlan:
        """Return the plan of a stream's next chunk; it stays until the chunk is finished.

        Args:
            config: says whether cameras are of latents or of video frames; either will do where
                it has no policy.
            stream: name of it.
            poses: cameras of the history, of which the number is compared; or None.
            held: as in `Session.chunk`.

        Raises:
            LipassError: there is no more.
            ValueError: another history than was recorded, or one that does not hold what is read.
        """
        left = self._left.get(stream)
        if not left:
            raise LipassError(
                f"a replay has as many chunks as were recorded, got one more for {stream!r}; "
                f"recorded streams: {', '.join(self._left) or 'none'}"
            )
        if poses is not None and left[0].history_latents not in _latents(len(poses), config):
            raise ValueError(
                f"a replayed chunk must have the recorded history, got {len(poses)} cameras for "
                f"{left[0].history_latents} latents; replay with the trajectory it was recorded on"
            )
        plan = left[0]
        there = None if held is None else indices_of(held, plan.history_latents, "held")
        if is_off():
            return _all_of(plan, there)
        if there is not None and (lost := set(plan.context.indices) - set(there)):
            raise ValueError(
                f"a replayed chunk must hold what its plan reads, got none of {sorted(lost)}; "
                "hold what was held when it was recorded"
            )
        return plan

    def finished(self, stream: str) -> None:
        """Go on to the plan behind the one that was followed."""
        self._left[stream].popleft()

    def forget(self, stream: str) -> None:
        """Drop what is left of a stream; another one of its name, begun later, stays."""
        left = self._left.get(stream, deque())
        while left and left[0].index:
            left.popleft()

    def state(self) -> list[Any]:
        """Give what is left as plain data; `of` takes it back."""
        return [plan.to_dict() for plans in self._left.values() for plan in plans]

    @classmethod
    def of(cls, state: list[Any]) -> Replay:
        """Build the replay of a `state`."""
        return cls(map(ChunkPlan.from_dict, state))


def _latents(cameras: int, config: Config) -> set[int]:
    """Say how many latents a history may have by its cameras."""
    modes = {options.mode for options in (config.context, config.steps) if options}
    if "matrix-game" in modes:
        return {history_latents(cameras, "matrix-game")}
    return {cameras} if modes else {history_latents(cameras, mode) for mode in ("", "matrix-game")}


def _all_of(plan: ChunkPlan, held: Sequence[int] | None) -> ChunkPlan:
    """Return the plan of the same chunk where lipass is switched off."""
    context = keep(plan.history_latents, held, "held")
    every = Revisit(False, None, None, "lipass is switched off")
    return replace(plan, context=context, revisit=every, steps=None, dense_reason=None)
