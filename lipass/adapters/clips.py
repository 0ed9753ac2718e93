"""Drive pipelines that make one clip a call and keep nothing of it: each call is a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipass.adapters.adoption import Adoption
from lipass.adapters.driving import Driven, DrivenScheduler, refuse_other_axes
from lipass.policy.convention import inverted
from lipass.runtime.chunk import Chunk
from lipass.session import Session


class Clips:
    """The clips that a session is asked about, in the order in which they are made."""

    def __init__(self, session: Session) -> None:
        refuse_other_axes(session)
        self._driven = Driven(session)
        self._turns, self._stream = session.turns, ""
        self._is_c2w = session.given.convention.direction == "c2w"
        self._before: list[Tensor] = []
        self._now: Tensor | None = None

    def run(self, generate: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Make one clip; its cameras are part of the history of the next one."""
        self._now = None
        try:
            made = generate(*given, **named)
        except BaseException as error:
            self._driven.end(error)
            raise
        self._driven.end()
        if self._now is not None:
            self._before.append(self._now)
        return made

    def see(self, c2w: Tensor) -> None:
        """Take the cameras `[N, 4, 4]` of the clip that is being made, one a latent."""
        c2w = c2w.detach().cpu().double()
        self._now = c2w if self._is_c2w else inverted(c2w)

    def scheduler(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """Stand in for a class of schedulers, of which each clip makes one."""

        def make(*given: Any, **named: Any) -> DrivenScheduler:
            return DrivenScheduler(kind(*given, **named), self._opened, self._driven.end)

        return make

    def _opened(self) -> Chunk:
        if self._now is None:  # nothing says what it shows: a stream of its own, nobody's revisit
            return self._driven.begin(latents=torch.empty(0, 1), stream=self._turns.fresh())
        if not self._before:
            self._stream = self._turns.fresh()
        history = torch.cat(self._before) if self._before else None
        return self._driven.begin(poses=history, query=self._now, stream=self._stream)


def drive_clips(pipeline: Any, session: Session, adoption: Adoption, name: str) -> Clips:
    """Bind the method of a pipeline that makes a clip, and return what else is told of clips."""
    clips, own = Clips(session), getattr(pipeline, name)

    def generate(*given: Any, **named: Any) -> Any:
        return clips.run(own, *given, **named)

    adoption.rebind(pipeline, name, generate, "each clip is a chunk of the session")
    return clips
