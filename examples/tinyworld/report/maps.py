"""Draw a room from above: boxes, the walk, and the memory each chunk kept or dropped."""

import math

from .palette import KINDS, kind_of

_PAD_M, _MARGIN_M, _SPAN_M = 0.25, 1.0, 4.0
_VIEW_M = 0.55  # length of the drawn view wedge
_HALF_FOV_DEG = 25.0  # narrower than the camera's, so that neighbours stay apart


def room_map(room: dict, rollout: dict, first_frame: int, chunk_frames: int) -> str:
    """Return an SVG; layers of class `now` show chunk by chunk, driven by `--frame` in CSS.

    `first_frame` is the index in `rollout["camera"]` of the first generated frame.
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
    parts.append(_line("walk past", camera[: first_frame + 1]))
    parts.append(_line("walk", camera[first_frame:]))
    for position, chunk in enumerate(rollout["chunks"]):
        low = position * chunk_frames
        parts.append(f'<g class="now" style="--lo:{low};--hi:{low + chunk_frames - 1}">')
        parts += _memory(camera, chunk)
        current = camera[first_frame + low : first_frame + low + chunk_frames]
        parts.append(f'<path class="view" d="{"".join(_wedge(pose) for pose in current)}"/></g>')
    return "".join([*parts, "</g></svg>"])


def _view_box(size_m: list[float], camera: list) -> str:
    """Show the part of the room around the walk: most walks use little of it."""
    spans = []
    for axis, room_m in enumerate(size_m):
        places = [pose[axis] for pose in camera]
        middle = (min(places) + max(places)) / 2
        half = max((max(places) - min(places)) / 2 + _MARGIN_M, _SPAN_M / 2)
        low, high = max(middle - half, -_PAD_M), min(middle + half, room_m + _PAD_M)
        spans.append((low, high))
    (left, right), (near, far) = spans
    return f"{left:.2f} {size_m[1] - far:.2f} {right - left:.2f} {far - near:.2f}"


def _memory(camera: list, chunk: dict) -> list[str]:
    """Dots at the cameras of the chunk's candidates, one path a kind; dropped ones are small."""
    kept = set(chunk["context"])
    dots: dict[str, list] = {}
    for frame, reason in chunk["reasons"].items():
        kind = kind_of(reason) if int(frame) in kept else "dropped"
        dots.setdefault(kind, []).append(camera[int(frame)])
    missing = kept - {int(frame) for frame in chunk["reasons"]}
    dots.setdefault("kept", []).extend(camera[frame] for frame in sorted(missing))
    order = ["dropped", *KINDS]
    return [
        f'<path class="dot {kind}" d="{"".join(f"M{x:.2f} {z:.2f}h0" for x, z, _ in poses)}"/>'
        + (f'<path class="look {kind}" d="{_looks(poses)}"/>' if kind != "dropped" else "")
        for kind, poses in sorted(dots.items(), key=lambda item: order.index(item[0]))
        if poses
    ]


def _looks(poses: list) -> str:
    parts = []
    for x, z, yaw_deg in poses:
        yaw = math.radians(yaw_deg)
        parts.append(f"M{x:.2f} {z:.2f}l{0.3 * math.sin(yaw):.2f} {0.3 * math.cos(yaw):.2f}")
    return "".join(parts)


def _line(kind: str, poses: list) -> str:
    points = " ".join(f"{x:.2f},{z:.2f}" for x, z, _ in poses)
    return f'<polyline class="{kind}" points="{points}"/>'


def _wedge(pose: list) -> str:
    x, z, yaw_deg = pose
    corners = []
    for side in (-_HALF_FOV_DEG, _HALF_FOV_DEG):
        angle = math.radians(yaw_deg + side)
        corners.append(f"{x + _VIEW_M * math.sin(angle):.2f} {z + _VIEW_M * math.cos(angle):.2f}")
    return f"M{x:.2f} {z:.2f}L{corners[0]}L{corners[1]}Z"
