"""Drive rollouts that denoise block by block over a list of levels, and then refresh a cache.

The pipeline keeps its loop. Where it begins to go through the levels of a block, a chunk is opened
and the levels of the steps that compute are given, so noise is added at the level of the next one
of these. The call behind them, on what was denoised, belongs to the chunk and to no step of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipass.runtime.chunk import Chunk
from lipass.session import Session


@dataclass(frozen=True)
class Cache:
    """How many latents a rolled cache has room for, those being generated included."""

    latents: int
    window: int
    """How many of them, the latest, attention reads."""
    sink: int = 0
    """How many stay in front when it is rolled."""

    def held(self, history: int, new: int) -> list[int]:
        """Return which latents of a history are read beside the new ones, in order."""
        there = list(range(history + new))
        if (over := len(there) - self.latents) > 0:
            there = there[: self.sink] + there[self.sink + over :]
        return [latent for latent in there[-self.window :] if latent < history]


class Blocks:
    """What a driven rollout has generated, and the chunk that it is at."""

    def __init__(
        self,
        session: Session,
        *,
        cache: Callable[[], Cache | None],
        new_latents: Callable[[int], int],
        sigma_of: Callable[[Any], float],
    ) -> None:
        """Begin before the first block.

        Args:
            session: asked for each block.
            cache: returns what holds the history; None holds all of it.
            new_latents: returns how many latents are generated behind so many.
            sigma_of: returns the noise level of an entry of the list of levels.
        """
        self._session, self._cache = session, cache
        self._new_latents, self._sigma_of = new_latents, sigma_of
        self._poses: Tensor | None = None
        self._stream = "main"
        self._latents: list[Tensor] = []
        self._chunk: Chunk | None = None
        self.in_step = False

    def begin(self) -> Chunk:
        """Open the chunk of the next block; the one before is over."""
        self.finish()
        history = len(self._latents)
        new = self._new_latents(history)
        cache = self._cache()
        given: dict[str, Any] = {
            "latents": torch.stack(self._latents) if self._latents else torch.empty(0, 1),
            "held": None if cache is None else cache.held(history, new),
            "stream": self._stream,
        }
        if self._poses is not None:
            if len(self._poses) < history + new:
                raise ValueError(
                    f"poses must hold a camera for each latent of the rollout, got "
                    f"{len(self._poses)} for latents up to {history + new}; pass [N, 4, 4] of all"
                )
            given["query"] = self._poses[history : history + new]
            given["poses"] = self._poses[:history] if history else None
            given["latents"] = given["latents"] if history else None
        elif self._session.recorded is None:
            index = self._session.turns.next(self._stream)
            self._session.given.follow(history, new, self._stream, index)
        self._chunk = self._session.chunk(**given).__enter__()
        return self._chunk

    def steps(self, levels: Any) -> Iterator[int]:
        """Open the next chunk, and yield which of its levels to compute, one after the other."""
        chunk = self.begin()
        sigmas = [self._sigma_of(level) for level in levels]
        for step in chunk.steps([*sigmas, 0.0]):
            self.in_step = True
            yield step.index
            self.in_step = False

    def indices(self, total: int) -> list[int]:
        """Return which of so many levels the chunk that is open computes."""
        if self._chunk is None:
            return list(range(total))
        return [step.index for step in self._chunk.step_plan(total).sequence()]

    def add(self, latents: Tensor, at: int) -> None:
        """Take clean latents `[B, T, ..]` for those from `at` on of the rollout."""
        self._latents[at:] = [one.detach() for one in latents.unbind(1)]

    def restart(self, poses: Tensor | None = None) -> None:
        """Begin another rollout, in a stream of its own, without a history.

        Args:
            poses: `[N, 4, 4]` cameras of all latents that will be, or None.
        """
        self.finish()
        self._poses = poses
        self._stream = self._session.turns.fresh()
        self._latents.clear()

    def finish(self, error: BaseException | None = None) -> None:
        """Close the chunk that is open; one that has failed is not counted."""
        chunk, self._chunk, self.in_step = self._chunk, None, False
        if chunk is not None:
            chunk.__exit__(None if error is None else type(error), error, None)


class Levels:
    """Stand for the list of levels of a pipeline, which goes through it once a block."""

    def __init__(self, levels: Tensor, blocks: Blocks) -> None:
        self._levels, self._blocks = levels, blocks

    def __iter__(self) -> Iterator[Tensor]:
        for index in self._blocks.steps(self._levels):
            yield self._levels[index]

    def __len__(self) -> int:
        return len(self._blocks.indices(len(self._levels)))

    def __getitem__(self, index: int) -> Tensor:
        return self._levels[self._blocks.indices(len(self._levels))[index]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._levels, name)
