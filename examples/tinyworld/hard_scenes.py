"""Walks on which memory by cameras is hard: where approximations are likely to fail.

Each is a room, cameras and a light; what is recorded of it and what is generated is as in
`scenario`. A room is the one of its seed, or the next that has what the walk needs.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.policy.trajectory import parse_trajectory

from .camera import EYE_HEIGHT_M, STEP_DEG, camera_to_world, invert
from .codec import Codec
from .model import CHUNK_LATENTS
from .scenario import CHUNKS, PATHS, REGIMES, Scenario, make_scenario, record
from .stream_walks import out_and_back
from .world import Attributes, Room, is_free, make_room, place, render_depth

_FRAMES = CHUNKS * CHUNK_LATENTS
_LONG_CHUNKS = 64
_OUT, _BACK = _FRAMES // 2 - 1, _FRAMES // 2
_FAST_DEG = 18.0
# A whole turn in half of the walk.
_ROUND_DEG = 360 / _OUT
_SLOW_M = 0.06
_PLACES = 16
_WALKED, _DOOR_M, _DOOR_DEG = 17, 2.2, 90.0


class Hard(NamedTuple):
    """A walk `w2c [F, 4, 4]` through a room in a light."""

    room: Room
    w2c: Tensor
    attributes: Attributes = Attributes()


def _generator(room: Room) -> torch.Generator:
    return torch.Generator().manual_seed(room.seed * 10 + 9)


def _turned(room: Room, step_deg: float) -> Tensor:
    poses = parse_trajectory(f"left-{_OUT}, right-{_BACK}", step_deg=step_deg)
    return place(room, poses, _generator(room))


def _fast_turn(seed: int) -> Hard:
    """Turn by a quarter of what is seen from one latent to the next."""
    room = make_room(seed)
    return Hard(room, _turned(room, _FAST_DEG))


def _fog(seed: int) -> Hard:
    """Turn in thick fog, where little but the nearest shows."""
    room = make_room(seed)
    return Hard(room, _turned(room, STEP_DEG), Attributes(air="fog"))


def _look_alike(seed: int) -> Hard:
    """Turn round in a square room with four walls alike and nothing in it."""
    room = make_room(seed)
    surfaces, size = room.surfaces[:6].clone(), room.size_m.clone()
    size[2] = size[0]
    surfaces[[1, 4, 5]] = surfaces[0].clone()
    surfaces[:, 16:18] = -20.0  # a picture of negative size is not shown
    alike = dataclasses.replace(
        room, layout="bare", size_m=size, boxes=room.boxes[:0], surfaces=surfaces
    )
    return Hard(alike, _turned(alike, _ROUND_DEG))


def _near_wall(seed: int) -> Hard:
    """Sidestep along what is near: of several places the one with the least to see."""
    room = make_room(seed)
    poses = parse_trajectory(f"d-{_OUT}, a-{_BACK}", step_m=_SLOW_M)
    generator = _generator(room)
    placed = [place(room, poses, generator, tries=40) for _ in range(_PLACES)]
    return Hard(room, min(placed, key=lambda w2c: _mean_depth(room, w2c)))


def _mean_depth(room: Room, w2c: Tensor) -> float:
    return float(render_depth(room, w2c[:: _FRAMES // 4], 8).mean())


def _door(seed: int) -> Hard:
    """Go round the free end of a partition, look behind it, and come back."""
    for one in itertools.count(seed):
        room = make_room(one)
        if room.layout == "partition":
            w2c, clear = _through(room)
            if clear:
                return Hard(room, w2c)
    raise AssertionError("some rooms have a partition with space at its end")


def _through(room: Room) -> tuple[Tensor, bool]:
    """Cameras of the way round the first box, and whether all of it is free."""
    (low, high), width, depth = room.boxes[0].tolist(), *room.size_m[[0, 2]].tolist()
    along_x = high[0] - low[0] > high[2] - low[2]
    steps = torch.linspace(-_DOOR_M / 2, _DOOR_M / 2, _WALKED)
    turn = torch.linspace(0, _DOOR_DEG, _OUT + 1 - _WALKED + 1)[1:]
    if along_x:
        x = torch.full_like(steps, (high[0] + width) / 2)
        z = steps + (low[2] + high[2]) / 2
        yaw, side = 0.0, -1.0
    else:
        x = steps + (low[0] + high[0]) / 2
        z = torch.full_like(steps, (high[2] + depth) / 2)
        yaw, side = 90.0, 1.0
    x, z = (torch.cat([one, one[-1:].expand(len(turn))]) for one in (x, z))
    yaws = yaw + side * torch.cat([torch.zeros(_WALKED), turn])
    position = torch.stack([x, torch.full_like(x, -EYE_HEIGHT_M), z], -1)
    out = invert(camera_to_world(position, yaws, torch.zeros_like(yaws)))
    places = zip(x.tolist(), z.tolist(), strict=True)
    return torch.cat([out, out.flip(0)]), all(is_free(room, a, b, 0.2) for a, b in places)


def _long(seed: int) -> Hard:
    """Walk with loops for 64 chunks, the second half of which leads back over the first."""
    room = make_room(seed)
    return Hard(room, out_and_back(room, _LONG_CHUNKS * CHUNK_LATENTS))


HARD: dict[str, Callable[[int], Hard]] = {
    "fast turn": _fast_turn,
    "fog": _fog,
    "look-alike": _look_alike,
    "near wall": _near_wall,
    "door": _door,
}
LONG = "long"
TRAJECTORIES = (*PATHS, *HARD, LONG)


def scene_of(trajectory: str, regime: str, seed: int, codec: Codec) -> Scenario:
    """Make the scene of any trajectory.

    Raises:
        ValueError: no such trajectory or regime.
    """
    if trajectory in PATHS:
        return make_scenario(trajectory, regime, seed, codec)
    if trajectory not in TRAJECTORIES or regime not in REGIMES:
        raise ValueError(
            f"a scene is one of {TRAJECTORIES} in {REGIMES}, got {trajectory!r}, {regime!r}"
        )
    hard = (HARD | {LONG: _long})[trajectory](seed)
    given = CHUNK_LATENTS if regime == "free" else len(hard.w2c) // 2
    return record(trajectory, regime, hard.room, hard.attributes, hard.w2c, given, codec)
