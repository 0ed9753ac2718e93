"""The world: procedural rooms and an exact ray caster, the ground truth for every pose.

A room is an axis-aligned hall with boxes, pillars or a partition inside, soft-edged textures of
low spatial frequency (nothing to alias) and pictures on the walls. Prompt attributes from a
closed vocabulary (time of day, air, palette) change the light, never the geometry.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .camera import EYE_HEIGHT_M, camera_to_world, invert, pixel_directions
from .catalogue import CATALOGUE_SEED, choose, furnished, size_of

HELD_OUT_SEED = 9000

TIMES = {"day": (1.0, 1.0, 1.0), "dusk": (0.98, 0.76, 0.60), "night": (0.40, 0.48, 0.70)}
AIRS = {"clear": 0.02, "haze": 0.07, "fog": 0.16}
PALETTES = {"plain": (1.0, 1.0, 1.0), "warm": (1.08, 0.97, 0.78), "cool": (0.80, 0.98, 1.10)}
LAYOUTS = ("boxes", "pillars", "partition", "mixed")

# Ahead, aside, turn. Turns on the spot come twice, so that a walk looks around.
_MOVES = (
    *((1, 0, 0), (1, 0, 1), (1, 0, -1), (-1, 0, 0), (0, 1, 0), (0, -1, 0)),
    *((0, 0, 1), (0, 0, -1), (0, 0, 1), (0, 0, -1)),
)
_NORMAL_LIGHT = torch.tensor([0.86, 1.0, 0.97])
_RAY_EPS = 1e-9
_WALLS = (0, 1, 4, 5)
# The first numbers of a texture: colours, pattern, frequencies, phases and sharpness.
_WALLPAPER = 14
# Views that are cast together: a CPU's cache holds one, a GPU is not busy with less.
_VIEWS_AT_ONCE = {"cpu": 1}
_VIEWS_ON_DEVICE = 16


@dataclass(frozen=True)
class Attributes:
    """One value from each of the three prompt vocabularies."""

    time: str = "day"
    air: str = "clear"
    palette: str = "plain"


def draw_attributes(generator: torch.Generator) -> Attributes:
    """Draw one attribute of each kind uniformly."""

    def pick(names: dict) -> str:
        return list(names)[int(torch.randint(len(names), (), generator=generator))]

    return Attributes(pick(TIMES), pick(AIRS), pick(PALETTES))


@dataclass(frozen=True)
class Room:
    """One room.

    `size_m [3]` is width, height, depth; the floor is y = 0 and the ceiling y = -height.
    `boxes [N, 2, 3]` are lower and upper corners. `surfaces [6 + N, 29]` holds the texture of
    the walls (-x, +x), ceiling and floor (-y, +y), walls (-z, +z), then of each box.
    """

    seed: int
    layout: str
    size_m: Tensor
    boxes: Tensor
    surfaces: Tensor


def make_room(seed: int) -> Room:
    """Build the room of a seed; seeds from `HELD_OUT_SEED` up are never trained on.

    Seeds from `CATALOGUE_SEED` on are rooms of the catalogue, which has its own that are held out.
    """
    if seed >= CATALOGUE_SEED:
        size = size_of(seed)
        return Room(seed, "catalogue", size, *furnished(size, choose(seed)))
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    layout = LAYOUTS[int(torch.randint(len(LAYOUTS), (), generator=generator))]
    size = torch.stack([uniform(5.0, 8.5), uniform(2.6, 3.2), uniform(5.0, 8.5)])
    boxes = _furniture(layout, size, uniform)
    surfaces = torch.stack([_texture(i, size, uniform) for i in range(6 + len(boxes))])
    # One wallpaper a room, as people do it; what is behind the camera can then be imagined.
    surfaces[list(_WALLS), :_WALLPAPER] = surfaces[_WALLS[0], :_WALLPAPER].clone()
    return Room(seed, layout, size, boxes, surfaces)


def bare(room: Room) -> Room:
    """Return the hall of a room unfurnished and unpainted: what its plan tells."""
    surfaces = torch.zeros_like(room.surfaces[:6])
    shade = torch.tensor([0.6, 0.6, 0.95, 0.3, 0.6, 0.6])
    surfaces[:, :6] = shade[:, None]
    # A picture of negative size is not shown.
    surfaces[:, 16:18] = -20.0
    return Room(room.seed, "bare", room.size_m, room.boxes[:0], surfaces)


def _furniture(layout: str, size: Tensor, uniform) -> Tensor:
    width, height, depth = size.tolist()
    boxes = []

    def add(x: float, z: float, half_x: float, half_z: float, tall: float) -> None:
        boxes.append([[x - half_x, -tall, z - half_z], [x + half_x, 0.0, z + half_z]])

    def near_wall() -> tuple[float, float]:
        side = int(uniform(0, 4))
        along, off = float(uniform(0.12, 0.88)), float(uniform(0.05, 0.16))
        return {
            0: (off * width, along * depth),
            1: ((1 - off) * width, along * depth),
            2: (along * width, off * depth),
            3: (along * width, (1 - off) * depth),
        }[side]

    if layout in ("boxes", "mixed"):
        for _ in range(int(uniform(2, 4.99))):
            x, z = near_wall()
            half = uniform(0.25, 0.6, 2).tolist()
            add(x, z, half[0], half[1], float(uniform(0.5, 1.9)))
    if layout in ("pillars", "mixed"):
        for _ in range(int(uniform(1, 3.99)) if layout == "pillars" else 1):
            half = float(uniform(0.14, 0.28))
            x, z = uniform(0.2, 0.8, 2).tolist()
            add(x * width, z * depth, half, half, height)
    if layout == "partition":
        length, at = float(uniform(0.25, 0.45)), float(uniform(0.3, 0.7))
        if uniform(0, 1) < 0.5:
            add(length * width / 2, at * depth, length * width / 2, 0.1, height)
        else:
            add(at * width, length * depth / 2, 0.1, length * depth / 2, height)
        x, z = near_wall()
        add(x, z, 0.4, 0.4, float(uniform(0.6, 1.4)))
    return torch.tensor(boxes)


def _texture(surface: int, size: Tensor, uniform) -> Tensor:
    base = uniform(0.25, 0.95, 3)
    base = base.mean() + 0.6 * (base - base.mean())
    contrast = {2: 0.12, 3: 0.22}.get(surface, 0.34)
    other = (base + uniform(-contrast, contrast, 3)).clamp(0.08, 1.0)
    if surface == 2:
        base, other = 0.45 + 0.55 * base, 0.45 + 0.55 * other
    weights = torch.nn.functional.one_hot((uniform(0, 3)).long(), 3).float()
    frequency = uniform(0.22, 0.6, 2)
    phase = uniform(0, 2 * math.pi, 2)
    sharpness = uniform(1.5, 5.0, 1)
    is_wall = surface in _WALLS
    span = size[2] if surface in (0, 1) else size[0]
    shown = 1.0 if is_wall and float(uniform(0, 1)) < 0.85 else -20.0
    centre = torch.stack([uniform(0.25, 0.75) * span, -uniform(1.35, 1.75)])
    half = torch.stack([uniform(0.4, 0.8), uniform(0.3, 0.5)]) * (1.0 if shown > 0 else 0.0)
    half = half + (0.0 if shown > 0 else -20.0)
    ink, paper = uniform(0.05, 0.95, 3), uniform(0.05, 0.95, 3)
    picture = torch.cat([centre, half, ink, paper, uniform(0.7, 1.3, 1), uniform(0, 6.3, 1)])
    edge = uniform(0.05, 0.45, 3)
    return torch.cat([base, other, weights, frequency, phase, sharpness, picture, edge])


def cast(room: Room, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest hit of rays `[R, 3]`: distance `[R]`, axis of the normal `[R]`, surface `[R]`."""
    direction = torch.where(direction.abs() < _RAY_EPS, _RAY_EPS, direction)
    inverse = 1.0 / direction
    width, height, depth = room.size_m.tolist()
    low = torch.tensor([0.0, -height, 0.0], device=direction.device)
    high = torch.tensor([width, 0.0, depth], device=direction.device)
    wall = torch.where(direction > 0, high, low)
    distance, axis = ((wall - origin) * inverse).min(-1)
    surface = 2 * axis + (direction.gather(-1, axis[:, None])[:, 0] > 0)
    for i, (corner_low, corner_high) in enumerate(room.boxes):
        a, b = (corner_low - origin) * inverse, (corner_high - origin) * inverse
        enter, enter_axis = torch.minimum(a, b).max(-1)
        leave = torch.maximum(a, b).amin(-1)
        hit = (enter < leave) & (enter > 1e-4) & (enter < distance)
        distance = torch.where(hit, enter, distance)
        axis = torch.where(hit, enter_axis, axis)
        surface = torch.where(hit, 6 + i, surface)
    return distance, axis, surface


def _albedo(room: Room, point: Tensor, axis: Tensor, surface: Tensor) -> Tensor:
    p = room.surfaces[surface]
    u = torch.where(axis == 0, point[:, 2], point[:, 0])
    v = torch.where(axis == 1, point[:, 2], point[:, 1])
    wave_u = torch.sin(2 * math.pi * p[:, 9] * u + p[:, 11])
    wave_v = torch.sin(2 * math.pi * p[:, 10] * v + p[:, 12])
    field = p[:, 6] * wave_u + p[:, 7] * wave_v + p[:, 8] * wave_u * wave_v
    mix = torch.sigmoid(p[:, 13] * field)[:, None]
    colour = p[:, 0:3] + (p[:, 3:6] - p[:, 0:3]) * mix
    inside = torch.minimum(p[:, 16] - (u - p[:, 14]).abs(), p[:, 17] - (v - p[:, 15]).abs())
    stroke = torch.sin(2 * math.pi * p[:, 24] * (u - p[:, 14]) + p[:, 25])
    drawing = torch.sigmoid(3 * (stroke + (v - p[:, 15]) * 2))[:, None]
    drawing = p[:, 18:21] + (p[:, 21:24] - p[:, 18:21]) * drawing
    rim = torch.sigmoid((inside + 0.10) / 0.025)[:, None]
    core = torch.sigmoid(inside / 0.025)[:, None]
    colour = colour + (p[:, 26:29] - colour) * rim
    return colour + (drawing - colour) * core


def render(
    room: Room, w2c: Tensor, attributes: list[Attributes], pixels: int = 64, samples: int = 2
) -> list[Tensor]:
    """Render `w2c [F, 4, 4]` once per attribute set, on the device of `w2c`.

    Returns one `[F, 3, pixels, pixels]` float tensor in 0..1 per entry of `attributes`, each
    pixel the mean of `samples` x `samples` rays.
    """
    side, device = pixels * samples, w2c.device
    camera_rays = pixel_directions(side, side).reshape(-1, 3).to(device)
    # The size stays on the host, where it is read.
    room = replace(room, boxes=room.boxes.to(device), surfaces=room.surfaces.to(device))
    normal_light = _NORMAL_LIGHT.to(device)
    shots: list[list[Tensor]] = [[] for _ in attributes]
    for poses in invert(w2c).split(_VIEWS_AT_ONCE.get(device.type, _VIEWS_ON_DEVICE)):
        direction = torch.cat([camera_rays @ pose[:3, :3].T for pose in poses])
        origin = poses[:, None, :3, 3].expand(-1, len(camera_rays), -1).reshape(-1, 3)
        distance, axis, surface = cast(room, origin, direction)
        point = origin + direction * distance[:, None]
        lit = _albedo(room, point, axis, surface) * normal_light[axis][:, None]
        metres = distance * direction.norm(dim=-1)
        for shot, attribute in zip(shots, attributes, strict=True):
            image = _shade(lit, metres, attribute).view(len(poses), side, side, 3)
            image = image.permute(0, 3, 1, 2).contiguous()
            shot.append(torch.nn.functional.avg_pool2d(image, samples))
    return [torch.cat(shot) for shot in shots]


def render_depth(room: Room, w2c: Tensor, pixels: int = 64) -> Tensor:
    """Depth `[F, pixels, pixels]` of pixel centres along the camera's axis, in metres."""
    camera_rays = pixel_directions(pixels, pixels).reshape(-1, 3)
    shots = []
    for pose in invert(w2c):
        # Rays have depth 1, so the distance in their lengths is depth.
        distance, _, _ = cast(room, pose[:3, 3], camera_rays @ pose[:3, :3].T)
        shots.append(distance.view(pixels, pixels))
    return torch.stack(shots)


def render_walls(room: Room, w2c: Tensor, pixels: int) -> Tensor:
    """Render a room of `bare` by one ray a pixel, to the bit as `render` does, in half the time.

    Returns `[F, 3, pixels, pixels]` in 0..1, by day in clear air.
    """
    camera_rays = pixel_directions(pixels, pixels).reshape(-1, 3)
    c2w = invert(w2c)
    direction = torch.cat([camera_rays @ pose[:3, :3].T for pose in c2w])
    origin = c2w[:, :3, 3].repeat_interleave(len(camera_rays), 0)
    distance, _, surface = cast(room, origin, direction)
    # A wall is of one colour, and its light hangs on the axis of its normal.
    lit = room.surfaces[:, :3] * _NORMAL_LIGHT[torch.arange(6) // 2][:, None]
    metres = distance * direction.norm(dim=-1)
    shown = _shade(lit[surface], metres, Attributes())
    return shown.view(len(c2w), pixels, pixels, 3).permute(0, 3, 1, 2).contiguous()


def _shade(lit: Tensor, metres: Tensor, attributes: Attributes) -> Tensor:
    light = torch.tensor(TIMES[attributes.time], device=lit.device)
    clear = torch.exp(-AIRS[attributes.air] * metres)[:, None]
    colour = lit * light * torch.tensor(PALETTES[attributes.palette], device=lit.device)
    return (colour * clear + 0.72 * light * (1 - clear)).clamp(0, 1)


def is_free(room: Room, x: float, z: float, margin_m: float = 0.45) -> bool:
    """Tell whether a person can stand at (x, z), `margin_m` away from every surface."""
    width, _, depth = room.size_m.tolist()
    if not (margin_m < x < width - margin_m and margin_m < z < depth - margin_m):
        return False
    for low, high in room.boxes.tolist():
        if (
            low[0] - margin_m < x < high[0] + margin_m
            and low[2] - margin_m < z < high[2] + margin_m
        ):
            return False
    return True


def place(room: Room, poses: Tensor, generator: torch.Generator, tries: int = 400) -> Tensor:
    """Move a trajectory `w2c [F, 4, 4]` that starts at the origin into the room.

    Draws start points and headings until every pose is free; of `tries` failures the one with
    the most free poses is returned, so a long walk may brush a wall but never leaves it out.
    """
    best, best_free = None, -1
    for _ in range(tries):
        draw = torch.rand(3, generator=generator)
        start = torch.tensor(
            [float(draw[0] * room.size_m[0]), -EYE_HEIGHT_M, float(draw[1] * room.size_m[2])]
        )
        yaw = draw[2] * 360
        placed = camera_to_world(start, yaw, torch.zeros(())) @ invert(poses)
        free = sum(is_free(room, float(p[0, 3]), float(p[2, 3])) for p in placed)
        if free > best_free:
            best, best_free = placed, free
        if free == len(poses):
            break
    assert best is not None
    return invert(best)


def random_walk(
    room: Room,
    frames: int,
    generator: torch.Generator,
    start: tuple[float, float, float] | None = None,
    step_m: float = 0.12,
    step_deg: float = 6.0,
) -> Tensor:
    """Walk like a person: runs of forward, back, sidestep and turns that stop at obstacles.

    `start` is x, z in metres and yaw in degrees; returns `w2c [frames, 4, 4]`.
    """

    def rand(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    if start is None:
        x, z = float(room.size_m[0]) / 2, float(room.size_m[2]) / 2
        for _ in range(200):
            x, z = rand(0, float(room.size_m[0])), rand(0, float(room.size_m[2]))
            if is_free(room, x, z):
                break
        yaw = rand(0, 360)
    else:
        x, z, yaw = start
    pitch = 0.0
    left, move, tilt, poses = 0, (0, 0, 0), 0.0, []
    for _ in range(frames):
        poses.append((x, z, yaw, pitch))
        if left == 0:
            move = _MOVES[int(rand(0, len(_MOVES) - 1e-6))]
            tilt = rand(-2.0, 2.0) if rand(0, 1) < 0.12 else -0.125 * pitch
            left = int(rand(3, 12))
        left -= 1
        yaw += move[2] * step_deg
        pitch = max(-15.0, min(15.0, pitch + tilt))
        heading = math.radians(yaw)
        ahead, aside = move[0] * step_m, move[1] * step_m
        nx = x + ahead * math.sin(heading) + aside * math.cos(heading)
        nz = z + ahead * math.cos(heading) - aside * math.sin(heading)
        if is_free(room, nx, nz):
            x, z = nx, nz
        else:
            left, move = int(rand(4, 12)), (0, 0, 1 if rand(0, 1) < 0.5 else -1)
    walk = torch.tensor(poses)
    height = torch.full_like(walk[:, 0], -EYE_HEIGHT_M)
    position = torch.stack([walk[:, 0], height, walk[:, 1]], -1)
    return invert(camera_to_world(position, walk[:, 2], walk[:, 3]))
