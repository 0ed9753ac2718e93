"""Pose strings: the little language in which people write camera paths (`w-31, s-32`).

Source: HY-WorldPlay's action grammar; the `w*8` form is minWM's. Ours also accepts both in one
string and refuses what either would silently misread. Differs in: moves stay level while the
camera looks up or down.
"""

import math
import re

import torch
from torch import Tensor

_MOVES = {"w": (0, 0, 1), "s": (0, 0, -1), "a": (-1, 0, 0), "d": (1, 0, 0)}
_TURNS = {"left": (-1, 0), "right": (1, 0), "up": (0, 1), "down": (0, -1)}
_TOKEN = re.compile(r"^([a-z]+)\s*[-*]\s*(\d+)$")


def parse_trajectory(text: str, *, step_m: float = 0.08, step_deg: float = 3.0) -> Tensor:
    """Turn a pose string into cameras.

    Each item is an action and a number of latents: `w s a d` move by `step_m` metres, `left right
    up down` turn by `step_deg` degrees. The first camera is the identity, so `n` steps give
    `n + 1` poses.

    Returns:
        `w2c [n + 1, 4, 4]` float32, OpenCV axes (x right, y down, z forward), metres.

    Raises:
        ValueError: unknown action, malformed item or no steps.
    """
    if not isinstance(text, str) or not all(map(math.isfinite, (step_m, step_deg))):
        raise ValueError(
            "a trajectory is a string, and its steps are finite, got "
            f"{(text, step_m, step_deg)!r:.60}; try 'w-31, s-32'"
        )
    items = [item.strip().lower() for item in text.split(",") if item.strip()]
    if not items:
        raise ValueError(f"a trajectory needs at least one item, got {text!r}; try 'w-31, s-32'")
    position, yaw, pitch = torch.zeros(3, dtype=torch.float64), 0.0, 0.0
    poses = [_world_to_camera(position, yaw, pitch)]
    for item in items:
        match = _TOKEN.match(item)
        if match is None or (match[1] not in _MOVES and match[1] not in _TURNS):
            known = " ".join([*_MOVES, *_TURNS])
            raise ValueError(
                f"a trajectory item is <action>-<latents> with an action of {known}, "
                f"got {item!r}; try 'w-31'"
            )
        for _ in range(int(match[2])):
            if match[1] in _MOVES:
                side, _, ahead = _MOVES[match[1]]
                heading = torch.tensor([math.sin(yaw), 0.0, math.cos(yaw)], dtype=torch.float64)
                right = torch.tensor([math.cos(yaw), 0.0, -math.sin(yaw)], dtype=torch.float64)
                position = position + step_m * (ahead * heading + side * right)
            else:
                turn, tilt = _TURNS[match[1]]
                yaw += math.radians(step_deg) * turn
                pitch += math.radians(step_deg) * tilt
            poses.append(_world_to_camera(position, yaw, pitch))
    if len(poses) == 1:
        raise ValueError(f"a trajectory needs at least one step, got {text!r}; try 'w-31'")
    return torch.stack(poses).float()


def _world_to_camera(position: Tensor, yaw: float, pitch: float) -> Tensor:
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    rows = [[cy, 0.0, -sy], [sy * sp, cp, cy * sp], [sy * cp, -sp, cy * cp]]
    rotation = torch.tensor(rows, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = rotation
    pose[:3, 3] = -rotation @ position
    return pose
