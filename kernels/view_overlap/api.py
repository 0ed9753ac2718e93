"""Score how much of one camera's view another camera shows: deterministic, batched, traceable.

The view is sampled at the middles of a fixed grid of cells: columns and rows of the picture times
depth planes evenly spaced in log depth between `near` and `far`. Every pixel counts the same and
so does every octave of depth, because nothing is known about where the surfaces are.

A point counts with the share of its cell that falls inside the other picture (a linear ramp one
cell wide, so that scores change continuously), times `distance here / distance there`, at most 1:
seen from twice as far, content is shown with half the detail. Without that factor a camera that
walks forward would find all of its view "seen" by the frames behind it. Occlusion is ignored.

Identical views score exactly 1, views turned by the field of view or more exactly 0.

Source: own; compare the Monte-Carlo ball of HY-WorldPlay (`lipass.policy.reference_worldplay`) and
the grid of Matrix-Game 3.0 (`lipass.policy.reference_matrixgame`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipass.kernels import registry
from lipass.kernels.autocast import in_given_dtypes

# A grid of 32 x 24 x 20 moves scores by less than 0.025 (tests/kernels/test_view_overlap.py).
COLUMNS, ROWS, DEPTHS = 8, 6, 4

# Poses multiplied in rounded arithmetic must still score exactly 1 against themselves.
_ROUNDING = 1e-4


def view_overlap(
    query_w2c: Tensor,
    memory_w2c: Tensor,
    hfov_deg: float,
    vfov_deg: float,
    near: float,
    far: float,
) -> Tensor:
    """Score each memory camera against each query camera.

    Args:
        query_w2c: `[..., Q, 4, 4]` rigid world-to-camera matrices, OpenCV axes.
        memory_w2c: `[..., M, 4, 4]`, same leading dimensions.
        hfov_deg: full horizontal field of view of all cameras, degrees.
        vfov_deg: full vertical field of view, degrees.
        near: nearest depth where the scene may be, in the unit of the poses.
        far: farthest depth, same unit.

    Returns:
        `[..., Q, M]` in [0, 1], in the dtype of `query_w2c`; not differentiable in a useful way.
    """
    scores = point_visibility(query_w2c, memory_w2c, hfov_deg, vfov_deg, near, far).mean(-1)
    return scores.to(query_w2c.dtype)


@in_given_dtypes
def point_visibility(
    query_w2c: Tensor,
    memory_w2c: Tensor,
    hfov_deg: float,
    vfov_deg: float,
    near: float,
    far: float,
) -> Tensor:
    """Score each sampled point of each query view; arguments as for `view_overlap`.

    Returns:
        `[..., Q, M, P]` in [0, 1], float32, with `P = COLUMNS * ROWS * DEPTHS`.
    """
    query, memory = query_w2c.double(), memory_w2c.double()
    edge_x = math.tan(math.radians(hfov_deg) / 2)
    edge_y = math.tan(math.radians(vfov_deg) / 2)
    across = _cell_middles(COLUMNS, query.device) * edge_x
    down = _cell_middles(ROWS, query.device) * edge_y
    octave = (_cell_middles(DEPTHS, query.device) + 1) / 2
    depth = near * (far / near) ** octave
    # [P, 3]: points in the query camera's frame.
    points = torch.stack(
        [
            (across[:, None, None] * depth).expand(COLUMNS, ROWS, DEPTHS),
            (down[None, :, None] * depth).expand(COLUMNS, ROWS, DEPTHS),
            depth.expand(COLUMNS, ROWS, DEPTHS),
        ],
        -1,
    ).reshape(-1, 3)

    # Query camera to memory camera, [..., Q, M, 3, 3] and [..., Q, M, 3]; rigid, so R^-1 = R^T.
    turn = memory[..., None, :, :3, :3] @ query[..., :, None, :3, :3].transpose(-1, -2)
    shift = memory[..., None, :, :3, 3] - (turn @ query[..., :, None, :3, 3:])[..., 0]
    # Relative poses need double precision far from the origin; the points around a camera do not.
    points = points.float()
    seen = turn.float() @ points.T + shift.float()[..., None]  # [..., Q, M, 3, P]
    x, y, z = seen.unbind(-2)
    distance = points.norm(dim=-1) * (1 + _ROUNDING)
    # The clamp matters only behind the camera, where the last factor is 0.
    per_depth = z.clamp_min(_ROUNDING * near).reciprocal()
    inside_x = (
        x.abs().mul_(per_depth).mul_(-COLUMNS / 2 / edge_x).add_((COLUMNS + 1) / 2 + _ROUNDING)
    )
    inside_y = y.abs().mul_(per_depth).mul_(-ROWS / 2 / edge_y).add_((ROWS + 1) / 2 + _ROUNDING)
    detail = (x * x).addcmul_(y, y).addcmul_(z, z).rsqrt_().mul_(distance).clamp_(max=1)
    return inside_x.clamp_(0, 1).mul_(inside_y.clamp_(0, 1)).mul_(detail).mul_(z > 0)


@in_given_dtypes
def may_see(
    query_w2c: Tensor,
    memory_w2c: Tensor,
    hfov_deg: float,
    vfov_deg: float,
    near: float,
    far: float,
) -> Tensor:
    """Tell cheaply which memory views may show a sampled point of any query view.

    The points of a view lie within eight corners. Where all of these are beyond one side of a
    memory view, none of the points scores there. Arguments as for `view_overlap`, without leading
    dimensions.

    Returns:
        `[M]` bool; False only where `point_visibility` is exactly 0 throughout.
    """
    edge_x = math.tan(math.radians(hfov_deg) / 2)
    edge_y = math.tan(math.radians(vfov_deg) / 2)
    corners = query_w2c.new_tensor(
        [
            (x * depth, y * depth, depth)
            for x in (-edge_x, edge_x)
            for y in (-edge_y, edge_y)
            for depth in (near, far)
        ],
        dtype=torch.float64,
    )
    query, memory = query_w2c.double(), memory_w2c.double()
    world = (corners - query[:, None, :3, 3]) @ query[:, :3, :3]  # [Q, 8, 3]
    seen = memory[:, :3, :3] @ world.flatten(0, 1).T + memory[:, :3, 3:]  # [M, 3, Q * 8]
    x, y, z = seen.unflatten(2, (len(query), 8)).unbind(1)
    # Ramps end half a cell beyond the edge; a little more, as scores are made in float32.
    wide_x, wide_y = (edge * (1 + 2 / n) for edge, n in ((edge_x, COLUMNS), (edge_y, ROWS)))
    beyond = torch.stack(
        [x - wide_x * z, -x - wide_x * z, y - wide_y * z, -y - wide_y * z, -z - _ROUNDING * near]
    )
    return ~(beyond > 0).all(-1).any(0).all(-1)


def _cell_middles(cells: int, device: torch.device) -> Tensor:
    """Middles of equal cells of [-1, 1], exactly symmetric about 0."""
    odd = torch.arange(1 - cells, cells, 2, device=device, dtype=torch.float64)
    return odd / cells


@torch.library.custom_op("lipass::view_overlap", mutates_args=())
def view_overlap_op(
    query_w2c: Tensor,
    memory_w2c: Tensor,
    hfov_deg: float,
    vfov_deg: float,
    near: float,
    far: float,
) -> Tensor:
    """Mean of `view_overlap` over the queries: `[B, Q, 4, 4]`, `[B, M, 4, 4]` -> `[B, M]`.

    `registry.answer("view_overlap", ..)` may stand in for it, with the same two tensors.
    """
    if (known := registry.answer_of("view_overlap")) is not None:
        return known(query_w2c, memory_w2c)
    return view_overlap(query_w2c, memory_w2c, hfov_deg, vfov_deg, near, far).mean(-2)


@view_overlap_op.register_fake
def _view_overlap_fake(
    query_w2c: Tensor,
    memory_w2c: Tensor,
    hfov_deg: float,
    vfov_deg: float,
    near: float,
    far: float,
) -> Tensor:
    return query_w2c.new_empty(memory_w2c.shape[:-2])
