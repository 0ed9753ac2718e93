"""Notice cameras that are written in another convention or unit than a session was told.

A wrong convention changes no shape and raises no error; it changes what is remembered. What gives
it away is the walk. Keys, pads and legs move a camera ahead, back or aside; read the other way
round, a walk that turns leads along no line of its camera. With the axes of OpenGL it leads
backwards all the way. In millimetres a camera leaves its scene at each step, and in a unit that is
too long it never gets anywhere.

Much cannot be told, and then nothing is said: turning on the spot, a straight walk and an orbit
are walks in either reading, and so is a world that is turned as a whole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lipass.options import ViewOptions
from lipass.policy.convention import Convention

Array = np.ndarray[Any, np.dtype[np.float64]]

# Of the longest step so far, and of `near`: shorter ones are standing still, or rounding.
_STILL, _ROUNDING = 0.05, 2e-4
# Sine of the angle, 10 degrees, by which a step may miss the plane through view and up, in which
# a camera may be tilted, or the axis across it.
_OFF_AHEAD, _ASIDE = 0.17, 0.985
# A reading is a walk where nearly all of the way leads ahead, back or aside, and none where half
# does; of ways in any direction a quarter would.
_WALK, _NO_WALK = 0.95, 0.5
# People mostly walk where they look. Read wrongly, that changes sides at each corner.
_WALK_AHEAD, _ONE_SIDE = 0.99, 0.85
_STEPS_MIN = 10
# Walking while looking one way only is a walk in both readings.
_TURN_MIN, _TREMBLES = math.radians(25.0), math.radians(1.0)
# People do walk backwards, but seldom so far, round corners, and never ahead.
_BACKWARDS, _BACKWARDS_MIN, _BACKWARDS_TURN_MIN = 0.9, 24, math.radians(90.0)
# A ride along one line, looking about, is the other reading of zooming to a thing and round it.
_ONE_LINE, _NEARLY_ONE_LINE = 0.95, 0.9
# Inverting makes a way of each turn. So a wrong reading is seldom the shorter one; where it is, it
# is the tremor of a hand.
_LONG = 0.8
# Of `far`: who moves by more from latent to latent shares little with the latent before.
_LEAP, _LEAPS_MIN = 0.5, 4
# Of `near`: shorter steps that lead farther than a breath change no view.
_CREEP, _SWAY, _CREEPS_MIN = 1 / 64, 1 / 32, 24


class PoseCheck:
    """What the walks of one session have shown of how their cameras are written.

    Looks at each camera once, on the host, in some tens of microseconds a chunk.

    Args:
        view: for the depths of the scene.
        convention: what the session was told.

    Attributes:
        walks: that of each stream.
    """

    def __init__(self, view: ViewOptions, convention: Convention) -> None:
        self._view = view
        self._convention = convention
        self.walks: dict[str, _Walk] = {}
        self._told = False

    def look(self, stream: str, history: Tensor, new: Tensor) -> str | None:
        """Look at the cameras of a chunk; return what is to be told, once a session.

        Args:
            stream: whose chunk it is.
            history: `[M, 4, 4]` w2c of the history, checked, on the CPU.
            new: `[q, 4, 4]` of the chunk.
        """
        if self._told:
            return None
        walk = self.walks.get(stream)
        if walk is None:
            walk = self.walks[stream] = _Walk(self._view)
        else:
            history = history[-1:]
        walk.add(np.concatenate([history.numpy(), new.numpy()]))
        found = walk.other_convention(self._convention) or walk.other_unit()
        self._told = found is not None
        return found

    def state(self) -> dict[str, Any]:
        """Give what was seen as plain data; `restore` takes it back."""
        return {"told": self._told, "walks": {n: one.state() for n, one in self.walks.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given."""
        self._told = state["told"]
        for stream, seen in state["walks"].items():
            walk = self.walks[stream] = _Walk(self._view)
            for reading, sums in zip(walk.readings, seen, strict=True):
                reading.restore(sums)


class _Walk:
    """One walk in both readings of its matrices: as they are, and inverted."""

    def __init__(self, view: ViewOptions) -> None:
        self._view = view
        self._given, self._inverted = _Reading(view), _Reading(view)

    @property
    def readings(self) -> tuple[_Reading, _Reading]:
        """Both, as they are and inverted."""
        return self._given, self._inverted

    def state(self) -> list[dict[str, Any]]:
        """Give the sums of both readings."""
        return [one.state() for one in self.readings]

    def add(self, cameras: Array) -> None:
        """Go on along `[n, 4, 4]`, the first of which is where the walk was."""
        turns, shifts = cameras[:, :3, :3], cameras[:, :3, 3]
        back = turns.transpose(0, 2, 1)
        self._given.add(turns, -(back @ shifts[:, :, None])[:, :, 0])
        self._inverted.add(back, shifts)

    def other_convention(self, told: Convention) -> str | None:
        """Say which convention the walk looks like, if it is not the one that was told."""
        given, inverted = self._given, self._inverted
        no_walk = given.is_no_walk() and inverted.is_walk()
        no_walk |= given.changes_sides() and inverted.is_walk(ahead=True)
        if no_walk and given.length > _LONG * inverted.length:
            # Inverting leaves the axes open: a turn of the whole world looks the same.
            axes = "opengl" if inverted.back > _BACKWARDS * inverted.length else "opencv"
            other = Convention(told.other().direction, axes)
            why = "does not lead along its views, as it would if the matrices were inverted"
        elif given.goes_backwards():
            other = Convention(told.direction, "opencv" if told.axes == "opengl" else "opengl")
            why = "leads backwards, round corners too"
        else:
            return None
        return (
            f"cameras must be written as the session's convention says, got {told} and a walk "
            f"that {why}, so it looks like {other}; if it is, open Session(..., "
            f"convention='{other}')"
        )

    def other_unit(self) -> str | None:
        """Say that the walk is too long or too short for the depths of the scene, if it is."""
        view, given = self._view, self._given
        # Where only one reading leaps, it is the reading that is wrong.
        if given.leaps_away() and self._inverted.leaps_away():
            what, factor = "leaves its scene at each step", "0.001 if they are in millimetres"
        elif given.creeps():
            what, factor = "gets nowhere", "what makes them metres"
        else:
            return None
        return (
            f"cameras must be in the unit of near and far (metres), got a walk that {what}: "
            f"{given.length / given.moves:.2g} from latent to latent, near {view.near:g} and far "
            f"{view.far:g}; multiply poses[:, :3, 3] and query[:, :3, 3] by {factor}, or give "
            "near and far in the unit of the cameras"
        )


class _Reading:
    """Sums over the steps of a walk, for one reading of its matrices.

    Attributes:
        moves: steps that lead somewhere.
        length: their length.
        straight: of it ahead, back or aside.
        ahead: of it along the direction of view.
        back: of it against the direction of view.
    """

    def __init__(self, view: ViewOptions) -> None:
        self._view = view
        self.moves = 0
        self.length = self.straight = self.ahead = self.back = 0.0
        self._leaps = 0
        self._longest = self._turned = self._farthest = 0.0
        self._lines, self._sides = np.zeros((3, 3)), np.zeros((3, 3))
        self._axes = np.zeros(3)
        self._start: Array | None = None
        self._looked: Array | None = None

    def state(self) -> dict[str, Any]:
        """Give the sums: numbers, and arrays as lists."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
            if name != "_view"
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take sums of `state`."""
        for name in self.state():
            value = state[name]
            setattr(self, name, np.array(value) if isinstance(value, list) else value)

    def add(self, turns: Array, centers: Array) -> None:
        """Go on along rotations `[n, 3, 3]` to the camera's axes and centres `[n, 3]`."""
        steps = centers[1:] - centers[:-1]
        if not len(steps):
            return
        lengths = np.sqrt((steps * steps).sum(1))
        self._longest = max(self._longest, float(lengths.max()))
        moved = lengths > max(_STILL * self._longest, _ROUNDING * self._view.near)
        if not moved.any():
            return
        if self._start is None:
            self._start = centers[0]
        steps, lengths = steps[moved], lengths[moved]
        self.moves += len(steps)
        self.length += float(lengths.sum())
        self._leaps += int((lengths > _LEAP * self._view.far).sum())
        self._lines += steps.T @ (steps / lengths[:, None])
        self._farthest = max(self._farthest, float(abs(centers - self._start).max()))
        # Controls turn in front of a step or behind it.
        before = (turns[:-1][moved] @ steps[:, :, None])[:, :, 0]
        behind = (turns[1:][moved] @ steps[:, :, None])[:, :, 0]
        sides = np.maximum(abs(before), abs(behind))
        self._axes += sides.sum(0)
        off = abs(np.stack([before[:, 0], behind[:, 0]]) / lengths)
        straight = ((off < _OFF_AHEAD) | (off > _ASIDE)).any(0)
        self.straight += float(lengths[straight].sum())
        self._sides += before.T @ (before / lengths[:, None])
        along = before[:, 2]
        self.ahead += float(along[along > 0].sum())
        self.back -= float(along[along < 0].sum())
        looks = turns[:-1][moved][:, 2]
        if self._looked is not None:
            looks = np.concatenate([self._looked, looks])
        (x, y, z), (a, b, c) = looks[1:].T, looks[:-1].T
        aside = np.sqrt((y * c - z * b) ** 2 + (z * a - x * c) ** 2 + (x * b - y * a) ** 2)
        turned = np.arctan2(aside, x * a + y * b + z * c)
        self._turned += float(turned[turned > _TREMBLES].sum())
        self._looked = looks[-1:]

    def is_walk(self, *, ahead: bool = False) -> bool:
        """Whether it leads along axes of the camera while the view turns, or ahead and back."""
        along = float(self._axes[2]) if ahead else self.straight
        return (
            self.moves >= _STEPS_MIN
            and along > (_WALK_AHEAD if ahead else _WALK) * self.length
            and self._turned > _TURN_MIN
            and not self._is_ride()
        )

    def is_no_walk(self) -> bool:
        """Whether it leads along no axis of the camera and no line of the world."""
        return (
            self.moves >= _STEPS_MIN
            and self.straight < _NO_WALK * self.length
            and not self._is_ride()
            and not self._is_mounted()
        )

    def changes_sides(self) -> bool:
        """Whether it leads along no single axis of the camera; less than `is_no_walk`."""
        return (
            self.moves >= _STEPS_MIN
            and max(self.straight, float(self._axes.max())) < _ONE_SIDE * self.length
            and not self._is_ride()
            and not self._is_mounted()
        )

    def goes_backwards(self) -> bool:
        """Whether it leads backwards for long, round corners, and never ahead."""
        return (
            self.moves >= _BACKWARDS_MIN
            and self.back > _BACKWARDS * self.length
            and self._turned > _BACKWARDS_TURN_MIN
            and not self._is_ride(_NEARLY_ONE_LINE)
        )

    def _is_ride(self, share: float = _ONE_LINE) -> bool:
        """Whether it leads along one line of the world, to and fro."""
        return float(np.linalg.eigvalsh(self._lines)[2]) > share * self.length

    def _is_mounted(self) -> bool:
        """Whether it leads along one line of the camera, as on a car that it looks out of."""
        return float(np.linalg.eigvalsh(self._sides)[2]) > _ONE_LINE * self.length

    def leaps_away(self) -> bool:
        """Whether neighbouring latents mostly share nothing."""
        return self._leaps >= _LEAPS_MIN and 2 * self._leaps > self.moves

    def creeps(self) -> bool:
        """Whether it goes somewhere, in steps that change no view."""
        near = self._view.near
        # A head that turns leads the eyes aside, on a small circle.
        leads = self.ahead + self.back > self.length / 2 or self._turned < _TURN_MIN
        return (
            leads
            and self.moves >= _CREEPS_MIN
            and self._longest < _CREEP * near
            and self._farthest > max(_SWAY * near, _CREEPS_MIN / 3 * self._longest)
        )
