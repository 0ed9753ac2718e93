"""Scenarios: a held-out room, a camera path and how much of it is recorded.

Explored: a recorded walk fills the history and the rest of the path sees only what was recorded,
so the renderer is the truth. Free: one chunk and the plan of the room are given, and everything
else imagined.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lipass.policy.trajectory import parse_trajectory

from .camera import STEP_DEG, STEP_M, invert
from .codec import Codec
from .model import CHUNK_LATENTS
from .world import Attributes, Room, bare, make_room, place, random_walk, render

CHUNKS = 16
PATHS = ("left/right", "forward/back", "loop")
REGIMES = ("explored", "free")
_TURN_LATENTS = 40


@dataclass(frozen=True)
class Scenario:
    """One rollout to make.

    `w2c [64, 4, 4]`; `truth [64, 3, P, P]` in 0..1; `given [M, C, Y, X]` latents of the recorded
    part; `walls [64, C, Y, X]` latents of the bare room along all of the path, zero in the
    explored regime, where memory has to do without them.
    """

    path: str
    regime: str
    room: Room
    attributes: Attributes
    w2c: Tensor
    truth: Tensor
    given: Tensor
    walls: Tensor

    @property
    def key(self) -> tuple[str, str, int]:
        """Path, regime and room seed."""
        return self.path, self.regime, self.room.seed


def camera_path(path: str, regime: str, room: Room) -> tuple[Tensor, int]:
    """Cameras `[64, 4, 4]` of a path in a room and how many of them are recorded."""
    generator = torch.Generator().manual_seed(room.seed * 10 + PATHS.index(path))
    frames = CHUNKS * CHUNK_LATENTS
    given = CHUNK_LATENTS if regime == "free" else frames // 2
    text = {"left/right": "left-31, right-32", "forward/back": "w-31, s-32", "loop": "right-63"}
    if path != "loop" or regime == "free":
        poses = parse_trajectory(text[path], step_m=STEP_M, step_deg=STEP_DEG)
        return place(room, poses, generator), given
    turn = parse_trajectory(f"left-{_TURN_LATENTS - 1}", step_deg=360 / _TURN_LATENTS)
    turn = place(room, turn, generator)
    last = invert(turn[-1])
    yaw = float(torch.rad2deg(torch.atan2(last[0, 2], last[2, 2])))
    start = (float(last[0, 3]), float(last[2, 3]), yaw)
    walk = random_walk(room, frames - _TURN_LATENTS + 1, generator, start, STEP_M, STEP_DEG)
    return torch.cat([turn, walk[1:]]), _TURN_LATENTS


def make_scenario(
    path: str, regime: str, seed: int, codec: Codec, attributes: Attributes | None = None,
    pixels: int = 64,
) -> Scenario:  # fmt: skip
    """Render and encode the scenario of a room seed, where the codec is; cameras stay here."""
    if path not in PATHS or regime not in REGIMES:
        raise ValueError(f"a scenario is one of {PATHS} in {REGIMES}, got {path!r}, {regime!r}")
    room = make_room(seed)
    w2c, given = camera_path(path, regime, room)
    return record(path, regime, room, attributes or Attributes(), w2c, given, codec, pixels)


@torch.no_grad()
def record(
    path: str, regime: str, room: Room, attributes: Attributes, w2c: Tensor, given: int,
    codec: Codec, pixels: int = 64,
) -> Scenario:  # fmt: skip
    """Render a walk `w2c [F, 4, 4]` through a room, and encode the first `given` frames."""
    seen = w2c.to(codec.latent_mean.device)
    truth = render(room, seen, [attributes], pixels)[0]
    latents = codec.encode(truth[:given])
    if regime == "free":
        walls = codec.encode(render(bare(room), seen, [Attributes()], pixels)[0])
    else:
        walls = latents.new_zeros(len(w2c), *latents.shape[1:])
    return Scenario(path, regime, room, attributes, w2c, truth, latents, walls)
