"""Let a loop that is not the user's own take its steps and chunks from a session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from lipass.errors import LipassError
from lipass.policy.convention import inverted
from lipass.runtime.chunk import Chunk
from lipass.session import Session


def refuse_other_axes(session: Session) -> None:
    """Refuse a session whose cameras look another way than those of a pipeline, OpenCV's.

    Raises:
        LipassError: names the convention to open the session with.
    """
    if str(session.given.convention) not in ("w2c-opencv", "c2w-opencv"):
        raise LipassError(
            f"the pipeline's cameras have OpenCV axes, got a session of "
            f"{session.given.convention}; open Session(convention='c2w')"
        )


def cameras_of(session: Session, viewmats: Tensor) -> Tensor:
    """Return what a pipeline calls `viewmats`, `[B, N, 4, 4]`, as its session takes cameras.

    They are OpenCV's, world to camera, in any session.

    Raises:
        LipassError: if the session's have other axes, or samples have other cameras.
    """
    refuse_other_axes(session)
    first = viewmats[0]
    if other := [i for i, one in enumerate(viewmats) if i and not one.equal(first)]:
        raise LipassError(
            f"samples of a driven rollout must share their cameras, got other ones for sample "
            f"{other[0]} of {len(viewmats)}; roll out samples of other cameras one by one"
        )
    is_c2w = session.given.convention.direction == "c2w"
    return inverted(first.detach().cpu().double()) if is_c2w else first


def module_of(pipeline: Any, *names: str) -> ModuleType:
    """Return the module in which a pipeline's code finds names.

    Of the classes above that of the pipeline it is the furthest one's: a user's own class may
    stand in a file that has imported the names too.

    Raises:
        LipassError: if no module of its classes has all of them.
    """
    for kind in reversed(type(pipeline).__mro__):
        module = sys.modules.get(kind.__module__)
        if module is not None and all(hasattr(module, name) for name in names):
            return module
    raise LipassError(
        f"a rollout that is driven must be of the release's class or below it, whose module has "
        f"{', '.join(names)}, got {type(pipeline).__module__}.{type(pipeline).__qualname__}; open "
        "chunks in a loop of your own"
    )


class Driven:
    """The chunks of one rollout, opened and closed as its loop goes; one at a time.

    Attributes:
        chunk: the one that is open, or None.
    """

    def __init__(self, session: Session) -> None:
        self.chunk: Chunk | None = None
        self._session = session

    def begin(self, **given: Any) -> Chunk:
        """Open the next chunk; what it is given is what `Session.chunk` takes."""
        self.end(LipassError("the clip before was not generated to its end"))
        self.chunk = self._session.chunk(**given)
        self.chunk.__enter__()
        return self.chunk

    def end(self, error: BaseException | None = None, of: Chunk | None = None) -> None:
        """Close the chunk that is open; with an error it was not generated to its end.

        Args:
            error: what ended it.
            of: the only chunk that is closed; None closes any.
        """
        if of is not None and of is not self.chunk:
            return
        chunk, self.chunk = self.chunk, None
        if chunk is not None:
            chunk.__exit__(None if error is None else type(error), error, None)


class DrivenTimesteps:
    """Stand in for the timesteps that a loop iterates over once a chunk: those of its session.

    With a rule of Euler the scheduler is told of each step where it starts and where it ends, so
    reused steps are merged into the ones before; with any other every step is taken, and the
    compiled model answers those that are reused.
    """

    def __init__(
        self,
        timesteps: Tensor,
        scheduler: Any,
        *,
        is_euler: bool,
        opened: Callable[[], Chunk],
        done: Callable[[BaseException | None, Chunk | None], None],
    ) -> None:
        """Keep what each iteration needs.

        Args:
            timesteps: as the loop was given them.
            scheduler: whose `step` the loop calls.
            is_euler: whether that is `x + (sigmas[i + 1] - sigmas[i]) * v`, with `i` in
                `_step_index`.
            opened: returns the chunk that the steps belong to.
            done: is called behind the last step, or with what ended the loop before, and with the
                chunk; a loop that failed may be let go of while the next one has its own.
        """
        self._timesteps = timesteps
        self._scheduler = scheduler
        self._is_euler = is_euler
        self._chunk: Chunk | None = None
        self._open = opened
        self._tell = done

    def _opened(self) -> Chunk:
        self._chunk = self._open()
        return self._chunk

    def _done(self, error: BaseException | None) -> None:
        self._tell(error, self._chunk)

    def __len__(self) -> int:
        return len(self._timesteps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timesteps, name)

    def __iter__(self) -> Iterator[Tensor]:
        chunk, sigmas = self._opened(), self._scheduler.sigmas
        chunk.coarse.by_pipeline = True
        try:
            if not self._is_euler:
                for step in chunk.steps(self._scheduler):
                    yield self._timesteps[step.index]
            else:
                for step in chunk.steps(sigmas):
                    self._scheduler.sigmas = sigmas.clone()
                    self._scheduler.sigmas[step.index + 1] = step.sigma_next
                    self._scheduler._step_index = step.index
                    yield self._timesteps[step.index]
        except BaseException as error:
            self._done(error)
            raise
        finally:
            self._scheduler.sigmas = sigmas
        self._done(None)


class DrivenScheduler:
    """A scheduler whose timesteps, as the loop iterates over them, are steps of a session.

    A multistep rule remembers its predictions, so it takes every step; the compiled model answers
    those that are reused.
    """

    def __init__(
        self,
        own: Any,
        opened: Callable[[], Chunk],
        done: Callable[[BaseException | None, Chunk | None], None],
    ) -> None:
        """Keep the scheduler; `opened` and `done` are those of `DrivenTimesteps`."""
        self._own = own
        self._opened = opened
        self._done = done

    @property
    def timesteps(self) -> DrivenTimesteps:
        """Give what the loop iterates over."""
        return DrivenTimesteps(
            self._own.timesteps, self._own, is_euler=False, opened=self._opened, done=self._done
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
