"""What `lipass eval` rolls out: a model with its methods and scenes, behind one small interface.

A user's own is a callable without arguments that returns a `Subject`: `lipass eval
file.py:callable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lipass.quality.figures import Rollout, Scene


class Case(NamedTuple):
    """One walk to generate.

    Attributes:
        trajectory: how the camera goes.
        regime: what is known in front of it, such as "explored" or "free".
        room: which room.
        seed: of the noise.
    """

    trajectory: str
    regime: str
    room: int
    seed: int = 0

    def __str__(self) -> str:
        told = f"{self.trajectory}, {self.regime}, room {self.room}"
        return f"{told}, seed {self.seed}" if self.seed else told


class Subject(Protocol):
    """A model with the ways to run it.

    Attributes:
        name: of the model.
        methods: names of the ways; the first is the dense one, which all are compared with.
        cases: the walks.
        settings: what results depend on beside these, such as the inner compiler and a checksum of
            the weights; plain data.
    """

    name: str
    methods: Sequence[str]
    cases: Sequence[Case]
    settings: Mapping[str, Any]

    def scene(self, case: Case) -> Scene:
        """Make the scene of a case; it is asked for once a case, and again in a later run."""

    def roll_out(self, method: str, case: Case, scene: Scene) -> Rollout:
        """Roll out once, the same each time; a method is compiled when it is first asked for."""
