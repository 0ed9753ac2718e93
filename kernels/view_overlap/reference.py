"""Define view overlap as a loop over the points of one camera's view, in plain Python floats.

Slow and obvious; `api.py` must agree with it. Imports nothing of what it checks.
"""

import math

Matrix = list[list[float]]
Point = tuple[float, float, float]

COLUMNS, ROWS, DEPTHS = 8, 6, 4


def view_overlap_reference(
    query_w2c: Matrix,
    memory_w2c: Matrix,
    hfov_deg: float,
    vfov_deg: float,
    near: float,
    far: float,
) -> float:
    """Return the share of the query camera's view that the memory camera shows, in [0, 1].

    Args:
        query_w2c: 4x4 nested lists, world to camera, OpenCV axes, rigid.
        memory_w2c: the other camera, likewise.
        hfov_deg: full horizontal field of view of both cameras, degrees.
        vfov_deg: full vertical field of view, degrees.
        near: nearest depth where the scene may be, in the unit of the poses.
        far: farthest depth.
    """
    edge_x = math.tan(math.radians(hfov_deg) / 2)
    edge_y = math.tan(math.radians(vfov_deg) / 2)
    total = 0.0
    for column in range(COLUMNS):
        for row in range(ROWS):
            for plane in range(DEPTHS):
                depth = near * (far / near) ** ((plane + 0.5) / DEPTHS)
                x = depth * edge_x * (2 * (column + 0.5) / COLUMNS - 1)
                y = depth * edge_y * (2 * (row + 0.5) / ROWS - 1)
                point = (x, y, depth)
                seen = _project(memory_w2c, _to_world(query_w2c, point))
                total += _visibility(seen, math.hypot(*point), edge_x, edge_y)
    return total / (COLUMNS * ROWS * DEPTHS)


def _visibility(seen: Point, query_distance: float, edge_x: float, edge_y: float) -> float:
    """Share of one cell that is inside the picture, times the detail with which it is shown."""
    x, y, depth = seen
    if depth <= 0:
        return 0.0
    inside_x = _clamp(COLUMNS / 2 * (1 - abs(x / depth) / edge_x) + 0.5)
    inside_y = _clamp(ROWS / 2 * (1 - abs(y / depth) / edge_y) + 0.5)
    return inside_x * inside_y * _clamp(query_distance / math.hypot(*seen))


def _clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _to_world(w2c: Matrix, point: Point) -> Point:
    shifted = [point[i] - w2c[i][3] for i in range(3)]
    x, y, z = (sum(w2c[i][j] * shifted[i] for i in range(3)) for j in range(3))
    return x, y, z


def _project(w2c: Matrix, point: Point) -> Point:
    x, y, z = (sum(w2c[i][j] * point[j] for j in range(3)) + w2c[i][3] for i in range(3))
    return x, y, z
