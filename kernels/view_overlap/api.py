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

import contextlib
import contextvars
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# A grid of 32 x 24 x 20 moves scores by less than 0.025 (tests/kernels/test_view_overlap.py).
COLUMNS, ROWS, DEPTHS = 8, 6, 4

# Poses multiplied in rounded arithmetic must still score exactly 1 against themselves.
_ROUNDING = 1e-4

_chosen: contextvars.ContextVar[tuple[int, ...] | bool] = contextvars.ContextVar(
    "chosen", default=False
)


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


def _cell_middles(cells: int, device: torch.device) -> Tensor:
    """Middles of equal cells of [-1, 1], exactly symmetric about 0."""
    odd = torch.arange(1 - cells, cells, 2, device=device, dtype=torch.float64)
    return odd / cells


@contextlib.contextmanager
def chosen_by_caller(kept: tuple[int, ...] | None = None) -> Iterator[None]:
    """Do not score views in graphs called inside: the caller has chosen what they may read.

    They were scored once for the chunk; a graph asks again in prefill and at each step.

    Args:
        kept: the views of the memory that score 1, all others -1, which is below any threshold;
            None where the memory holds nothing else.
    """
    token = _chosen.set(True if kept is None else kept)
    try:
        yield
    finally:
        _chosen.reset(token)


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

    Not scored inside of `chosen_by_caller`.
    """
    chosen = _chosen.get()
    if chosen is True:
        return query_w2c.new_ones(memory_w2c.shape[:-2])
    if chosen is not False:
        scores = query_w2c.new_full(memory_w2c.shape[:-2], -1.0)
        for view in chosen:
            scores[..., view] = 1.0
        return scores
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
