"""Cameras of TinyWorld: intrinsics, rays, relative poses and collision-aware walks.

Poses are world-to-camera matrices `[..., 4, 4]` in metres with OpenCV axes (x right, y down,
z forward). Frames are square and share one field of view, so intrinsics are two constants.
"""

import math

import torch
from torch import Tensor

FOV_DEG = 75.0
FOCAL = 0.5 / math.tan(math.radians(FOV_DEG / 2))
EYE_HEIGHT_M = 1.5
STEP_DEG = 6.0
STEP_M = 0.12


def camera_to_world(position: Tensor, yaw_deg: Tensor, pitch_deg: Tensor) -> Tensor:
    """Build `c2w [..., 4, 4]` from positions `[..., 3]`, yaw and pitch `[...]` in degrees.

    Yaw turns right about the vertical axis; pitch looks up.
    """
    yaw, pitch = torch.deg2rad(yaw_deg), torch.deg2rad(pitch_deg)
    cy, sy, cp, sp = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    zero = torch.zeros_like(cy)
    right = torch.stack([cy, zero, -sy], -1)
    down = torch.stack([sy * sp, cp, cy * sp], -1)
    forward = torch.stack([sy * cp, -sp, cy * cp], -1)
    c2w = torch.zeros(*yaw.shape, 4, 4, dtype=position.dtype)
    c2w[..., :3, :3] = torch.stack([right, down, forward], -1)
    c2w[..., :3, 3] = position
    c2w[..., 3, 3] = 1.0
    return c2w


def invert(pose: Tensor) -> Tensor:
    """Invert rigid transforms `[..., 4, 4]` without a general solver."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    inverse = torch.zeros_like(pose)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ pose[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def relative_to(w2c: Tensor, reference_w2c: Tensor) -> Tensor:
    """Express `w2c [..., F, 4, 4]` in the frame of one camera `[..., 4, 4]`."""
    return w2c @ invert(reference_w2c)[..., None, :, :]


def pixel_directions(rows: int, columns: int) -> Tensor:
    """Unnormalised directions `[rows, columns, 3]` of pixel centres in the camera frame."""
    v = (torch.arange(rows) + 0.5) / rows - 0.5
    u = (torch.arange(columns) + 0.5) / columns - 0.5
    v, u = torch.meshgrid(v, u, indexing="ij")
    return torch.stack([u / FOCAL, v / FOCAL, torch.ones_like(u)], -1)


def plucker_rays(w2c: Tensor, rows: int, columns: int) -> Tensor:
    """Plücker coordinates `[..., rows, columns, 6]` (direction, moment) of every token's ray."""
    c2w = invert(w2c)
    directions = pixel_directions(rows, columns).to(w2c)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    world = torch.einsum("...ij,yxj->...yxi", c2w[..., :3, :3], directions)
    origin = c2w[..., None, None, :3, 3].expand_as(world)
    return torch.cat([world, torch.linalg.cross(origin, world)], -1)


def view_similarity(query_w2c: Tensor, memory_w2c: Tensor) -> Tensor:
    """Cheap closeness `[Q, M]` in 0..1 of two sets of views: heading times distance."""
    query, memory = invert(query_w2c), invert(memory_w2c)
    heading = (query[:, None, :3, 2] * memory[None, :, :3, 2]).sum(-1).clamp(-1, 1).arccos()
    distance = (query[:, None, :3, 3] - memory[None, :, :3, 3]).norm(dim=-1)
    return (1 - torch.rad2deg(heading) / FOV_DEG).clamp_min(0) * torch.exp(-distance / 2.5)
