"""Let the denoising loop of a pipeline, which nobody can edit, be the loop of a chunk.

A scheduler is the clock of such a loop: `set_timesteps` begins it, each `step` ends a step. The
steps are those of `Chunk.steps(scheduler)`: the scheduler takes all of them, and the compiled
model answers the reused ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lipass.errors import LipassWarning
from lipass.runtime.steps import StepSequence

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk

_CLOCK = ("set_timesteps", "step")


class Follow:
    """Made by `Chunk.follow`; while it is open, the scheduler tells the chunk of its steps."""

    def __init__(self, chunk: Chunk, scheduler: Any) -> None:
        if missing := [name for name in _CLOCK if not callable(getattr(scheduler, name, None))]:
            raise TypeError(
                f"a scheduler must have {' and '.join(_CLOCK)}, got {type(scheduler).__name__} "
                f"without {missing[0]}; pass pipe.scheduler"
            )
        self._chunk = chunk
        self._scheduler = scheduler
        self._steps: StepSequence | None = None
        self._taken = 0

    def __enter__(self) -> Follow:
        if taken := [name for name in _CLOCK if name in vars(self._scheduler)]:
            raise ValueError(
                f"a scheduler is followed once at a time, got one whose {taken[0]} is bound "
                "already; leave the block that follows it, or give each pipeline its own"
            )
        self._bind("set_timesteps", self._begin)
        self._bind("step", self._next)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in _CLOCK:
            del vars(self._scheduler)[name]
        begun = self._steps is not None
        self._end()
        if begun and not self._taken and kind is None:
            warnings.warn(
                f"a followed scheduler must take the steps, got {type(self._scheduler).__name__} "
                "that took none after set_timesteps: the pipeline steps copies of it, so every "
                "step was computed; iterate over chunk.steps(...) in a loop of your own",
                LipassWarning,
                stacklevel=2,
            )

    def _bind(self, name: str, then: Callable[[], None]) -> None:
        vars(self._scheduler)[name] = _Told(self._scheduler, name, then)

    def _begin(self) -> None:
        self._end()
        self._taken = 0
        self._chunk.coarse.by_pipeline = True
        self._steps = self._chunk.steps(self._scheduler)
        next(self._steps)

    def _next(self) -> None:
        self._taken += 1
        if self._steps is not None and next(self._steps, None) is None:
            self._end()

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.close()
        self._steps = None


class _Told:
    """A method of a scheduler that says when it has run; copies of the scheduler do not."""

    def __init__(self, owner: Any, name: str, then: Callable[[], None]) -> None:
        self._owner = owner
        self._name = name
        self._then = then
        # pipelines look at the parameters of `step` before they call it
        self.__wrapped__ = getattr(owner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        self._then()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner), self._owner)
        return getattr(type(copied), self._name).__get__(copied)
