"""A catalogue: rooms whose walls and furniture are a handful of choices, each with a name.

In the other rooms everything is drawn from ranges, and what a view may show that no latent shows
has no end: what can be learned of it soon is a mean. Here it is one of few: a wallpaper for the
room, a picture or none on the middle of each wall, and a thing or none in each corner. Sizes of
rooms and walks are as free as before. All numbers lie in the ranges that the other rooms are
drawn from.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Rooms of seeds from here on are of the catalogue; those from the second on are never trained on.
CATALOGUE_SEED = 1_000_000
CATALOGUE_HELD_OUT_SEED = 1_009_000

# Colours, pattern, frequencies, phases and sharpness, as `Room.surfaces` begins.
_WALLPAPERS = {
    "stripes": (0.85, 0.80, 0.60, 0.58, 0.47, 0.38, 1, 0, 0, 0.50, 0.30, 0.0, 0.0, 4.0),
    "bands": (0.50, 0.66, 0.55, 0.80, 0.85, 0.75, 0, 1, 0, 0.30, 0.50, 0.0, 0.0, 4.0),
    "checks": (0.46, 0.50, 0.76, 0.75, 0.75, 0.90, 0, 0, 1, 0.40, 0.40, 0.0, 0.0, 4.0),
    "plain": (0.80, 0.72, 0.70, 0.80, 0.72, 0.70, 1, 0, 0, 0.30, 0.30, 0.0, 0.0, 2.0),
}
# Ink, paper, frequency and phase of the strokes, edge.
_PICTURES = {
    "sunset": (0.90, 0.30, 0.08, 0.95, 0.80, 0.25, 0.70, 0.0, 0.30, 0.20, 0.10),
    "sea": (0.06, 0.15, 0.50, 0.25, 0.60, 0.92, 1.00, 1.5, 0.40, 0.40, 0.40),
    "forest": (0.06, 0.30, 0.10, 0.35, 0.75, 0.28, 1.30, 3.0, 0.25, 0.15, 0.08),
    "rose": (0.70, 0.08, 0.35, 0.95, 0.60, 0.80, 0.80, 4.5, 0.10, 0.10, 0.10),
    "night": (0.06, 0.05, 0.12, 0.28, 0.20, 0.45, 1.20, 0.8, 0.45, 0.42, 0.30),
    "snow": (0.95, 0.95, 0.95, 0.65, 0.75, 0.80, 0.90, 2.2, 0.08, 0.08, 0.08),
}
# Half of the side and height in metres, colour; a pillar is as tall as its room.
_THINGS = {
    "chest": (0.50, 0.80, (0.55, 0.25, 0.15)),
    "cabinet": (0.40, 1.80, (0.25, 0.40, 0.60)),
    "pillar": (0.25, math.inf, (0.90, 0.90, 0.85)),
}
WALLPAPERS, PICTURES, THINGS = tuple(_WALLPAPERS), tuple(_PICTURES), tuple(_THINGS)
NAMES = (*WALLPAPERS, *PICTURES, *THINGS)
WALLS = (0, 1, 4, 5)

_NO_PICTURE_SHARE, _NO_THING_SHARE = 1 / 7, 1 / 4
_PICTURE_HALF_M, _PICTURE_UP_M = (0.8, 0.5), 1.55
_CORNER_M = 0.6
_CEILING = (0.90, 0.90, 0.88, 0.90, 0.90, 0.88)
_FLOOR = (0.55, 0.42, 0.30, 0.62, 0.50, 0.38)


@dataclass(frozen=True)
class Choice:
    """What a room is made of: its wallpaper, pictures by wall and things by corner, or None."""

    wallpaper: str
    pictures: tuple[str | None, ...]
    things: tuple[str | None, ...]


def size_of(seed: int) -> Tensor:
    """Draw width, height and depth `[3]` of a room in metres."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([5.0, 2.6, 5.0]), torch.tensor([8.5, 3.2, 8.5])
    return low + (high - low) * torch.rand(3, generator=generator)


def choose(seed: int) -> Choice:
    """Draw what the room of a seed is made of."""
    generator = torch.Generator().manual_seed(seed + 4_000_003)

    def one_of(names: tuple[str, ...], none_share: float) -> str | None:
        if float(torch.rand((), generator=generator)) < none_share:
            return None
        return names[int(torch.randint(len(names), (), generator=generator))]

    wallpaper = one_of(WALLPAPERS, 0.0)
    assert wallpaper is not None
    return Choice(
        wallpaper,
        tuple(one_of(PICTURES, _NO_PICTURE_SHARE) for _ in WALLS),
        tuple(one_of(THINGS, _NO_THING_SHARE) for _ in range(4)),
    )


def furnished(size_m: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Build `boxes [N, 2, 3]` and `surfaces [6 + N, 29]` of a room, as `Room` has them."""
    width, height, depth = size_m.tolist()
    surfaces = [_surface(_CEILING if i == 2 else _FLOOR) for i in range(6)]
    for wall, name in zip(WALLS, choice.pictures, strict=True):
        span = depth if wall in (0, 1) else width
        surfaces[wall] = _surface(_WALLPAPERS[choice.wallpaper], name, span)
    boxes = []
    for corner, name in enumerate(choice.things):
        if name is None:
            continue
        half, tall, colour = _THINGS[name]
        x = width - _CORNER_M if corner % 2 else _CORNER_M
        z = depth - _CORNER_M if corner // 2 else _CORNER_M
        tall = min(tall, height)
        boxes.append([[x - half, -tall, z - half], [x + half, 0.0, z + half]])
        surfaces.append(_surface((*colour, *colour)))
    return torch.tensor(boxes).reshape(-1, 2, 3), torch.stack(surfaces)


def _surface(begin: tuple[float, ...], picture: str | None = None, span: float = 0.0) -> Tensor:
    """Fill a row of `Room.surfaces`; a picture of negative size is not shown."""
    row = torch.zeros(29)
    row[6], row[9:11], row[13] = 1.0, 0.3, 2.0
    row[: len(begin)] = torch.tensor(begin)
    row[16:18] = -20.0
    if picture is not None:
        row[14:16] = torch.tensor([span / 2, -_PICTURE_UP_M])
        row[16:18] = torch.tensor(_PICTURE_HALF_M)
        row[18:] = torch.tensor(_PICTURES[picture])
    return row
