"""Draw a room from above: the walk, and where the memory looks that each chunk read or dropped."""

import math

from .palette import KINDS, kind_of

_PAD_M, _MARGIN_M, _SPAN_M = 0.25, 0.25, 2.2
_VIEW_M = 0.8  # how far a look reaches on the map
_HALF_FOV_DEG = 30.0


def room_map(room: dict, rollout: dict, first_frame: int, chunk_frames: int) -> str:
    """Return an SVG; layers of class `now` show chunk by chunk, driven by `--frame` in CSS.

    `first_frame` is the index in `rollout["camera"]` of the first generated frame. A frame is a
    dot where it looks, not where it was taken: a walk that turns in place is seen too.
    """
    width_m, depth_m = room["size"]
    camera = rollout["camera"]
    parts = [
        f'<svg class="map" viewBox="{_view_box(room["size"], camera)}" role="img" '
        'aria-label="room from above">',
        # z points away from the viewer and up on paper
        f'<g transform="matrix(1 0 0 -1 0 {depth_m:.3f})">',
        f'<rect class="room" width="{width_m:.3f}" height="{depth_m:.3f}"/>',
    ]
    for x0, z0, x1, z1 in room["boxes"]:
        x0, z0, x1, z1 = max(x0, 0), max(z0, 0), min(x1, width_m), min(z1, depth_m)
        parts.append(
            f'<rect class="box" x="{x0:.2f}" y="{z0:.2f}" width="{x1 - x0:.2f}" '
            f'height="{z1 - z0:.2f}"/>'
        )
    parts.append(f'<path class="looks" d="{"".join(map(_look, camera))}"/>')
    parts.append(_line("walk past", camera[: first_frame + 1]))
    parts.append(_line("walk", camera[first_frame:]))
    parts.append(
        f'<circle class="start" cx="{camera[0][0]:.2f}" cy="{camera[0][1]:.2f}" r=".06"/>'
    )
    for position, chunk in enumerate(rollout["chunks"]):
        low = position * chunk_frames
        parts.append(f'<g class="now" style="--lo:{low};--hi:{low + chunk_frames - 1}">')
        current = camera[first_frame + low : first_frame + low + chunk_frames]
        parts.append(f'<path class="view" d="{"".join(map(_wedge, current))}"/>')
        parts += [*_memory(camera, chunk), "</g>"]
    return "".join([*parts, "</g></svg>"])


def _view_box(size_m: list[float], camera: list) -> str:
    """Show the part of the room around the walk and its looks: most walks use little of it."""
    spans = []
    for axis, room_m in enumerate(size_m):
        places = [pose[axis] for pose in camera] + [_tip(pose)[axis] for pose in camera]
        middle = (min(places) + max(places)) / 2
        half = max((max(places) - min(places)) / 2 + _MARGIN_M, _SPAN_M / 2)
        spans.append((max(middle - half, -_PAD_M), min(middle + half, room_m + _PAD_M)))
    (left, right), (near, far) = spans
    return f"{left:.2f} {size_m[1] - far:.2f} {right - left:.2f} {far - near:.2f}"


def _memory(camera: list, chunk: dict) -> list[str]:
    """Dots where the chunk's candidates look, one path a kind; dropped ones are small."""
    kept = set(chunk["context"])
    dots: dict[str, list] = {}
    for frame, reason in chunk["reasons"].items():
        kind = kind_of(reason) if int(frame) in kept else "dropped"
        dots.setdefault(kind, []).append(camera[int(frame)])
    missing = kept - {int(frame) for frame in chunk["reasons"]}
    dots.setdefault("kept", []).extend(camera[frame] for frame in sorted(missing))
    order = ["dropped", *KINDS]
    return [
        f'<path class="look {kind}" d="{"".join(map(_look, poses))}"/>'
        f'<path class="dot {kind}" d="{"".join(map(_dot, poses))}"/>'
        for kind, poses in sorted(dots.items(), key=lambda item: order.index(item[0]))
        if poses
    ]


def _tip(pose: list, turned_deg: float = 0.0) -> tuple[float, float]:
    x, z, yaw_deg = pose
    yaw = math.radians(yaw_deg + turned_deg)
    return x + _VIEW_M * math.sin(yaw), z + _VIEW_M * math.cos(yaw)


def _look(pose: list) -> str:
    x, z = _tip(pose)
    return f"M{pose[0]:.2f} {pose[1]:.2f}L{x:.2f} {z:.2f}"


def _dot(pose: list) -> str:
    x, z = _tip(pose)
    return f"M{x:.2f} {z:.2f}h0"


def _line(kind: str, poses: list) -> str:
    points = " ".join(f"{x:.2f},{z:.2f}" for x, z, _ in poses)
    return f'<polyline class="{kind}" points="{points}"/>'


def _wedge(pose: list) -> str:
    corners = (_tip(pose, side) for side in (-_HALF_FOV_DEG, _HALF_FOV_DEG))
    told = "".join(f"L{x:.2f} {z:.2f}" for x, z in corners)
    return f"M{pose[0]:.2f} {pose[1]:.2f}{told}Z"
