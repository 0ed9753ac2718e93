"""Roll a model out under given options, and keep what came out and what each chunk took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipass.errors import LipassError
from lipass.policy.plan import ChunkPlan
from lipass.runtime.measured import Measured
from lipass.session import Session

RollOut = Callable[[Any, Any, Session], Tensor]


class Took(NamedTuple):
    """What one chunk read, computed and took."""

    latents: int
    steps: int
    ms: float
    compiled: bool = False


@dataclass(frozen=True)
class Run:
    """One rollout.

    Attributes:
        output: what the loop returned, on the CPU in float32.
        chunks: what each chunk took.
        plans: their decisions.
        latents: history that the last chunk was shown, on the CPU; None where none was.
    """

    output: Tensor
    chunks: tuple[Took, ...]
    plans: tuple[ChunkPlan, ...]
    latents: Tensor | None = None

    @property
    def decided(self) -> tuple[tuple[int, int], ...]:
        """Latents that were read and steps that were computed, by chunk."""
        return tuple((one.latents, one.steps) for one in self.chunks)


@dataclass(frozen=True)
class Subject:
    """A model, the loop around it and the walks to calibrate on.

    Attributes:
        model: module or function; what `roll_out` is called with.
        roll_out: `(model, walk, session)` to what was generated, a tensor.
        walks: by name.
    """

    model: Any
    roll_out: RollOut
    walks: Mapping[str, Any]

    @classmethod
    def of(
        cls, model: Any, roll_out: RollOut, walks: Mapping[str, Any] | Sequence[Any]
    ) -> Subject:
        """Check what a user has, and name walks that have no names.

        Raises:
            TypeError: a loop that cannot be called, or walks that are none.
            ValueError: no walk.
        """
        if not callable(roll_out):
            raise TypeError(
                "roll_out must be a function of (model, walk, session), got "
                f"{type(roll_out).__name__}; pass the loop around the model"
            )
        if not isinstance(walks, Mapping):
            if isinstance(walks, str | Tensor) or not isinstance(walks, Sequence):
                raise TypeError(
                    f"walks must be a list or a dict of walks, got {type(walks).__name__}; write "
                    "[walk] for one"
                )
            walks = {f"walk {number}": walk for number, walk in enumerate(walks)}
        if not walks:
            raise ValueError("a calibration needs walks, got none; pass some to roll out")
        return cls(model, roll_out, {str(name): walk for name, walk in walks.items()})

    @torch.no_grad()
    def run(self, model: Any, walk: str, session: Session) -> Run:
        """Roll out once.

        Raises:
            TypeError: the loop returns no tensor.
            LipassError: it asks the session for no chunk.
        """
        session.effect.told = True  # options that leave nothing out are tried on purpose
        session.measured = Measured()
        with session:
            output = self.roll_out(model, self.walks[walk], session)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"roll_out must return a tensor, got {type(output).__name__}; return the frames "
                "or latents that were generated"
            )
        records = session.measured.records
        if not records:
            raise LipassError(
                "roll_out must make its chunks inside `with session.chunk(...)`, got none; see "
                "docs/first-hour.md"
            )
        took = []
        for one in records:
            steps = one.plan.steps
            computed = 0 if steps is None else steps.total - one.steps_skipped
            read = len(one.plan.context.indices)
            took.append(Took(read, computed, one.seconds * 1e3, one.compiled))
        plans = tuple(one.plan for one in records)
        shown = session.measured.latents
        return Run(
            output.detach().to("cpu", torch.float32),
            tuple(took),
            plans,
            None if shown is None else shown.detach().cpu(),
        )
