"""A recogniser of what the catalogue names, trained on the renderer.

A small convolutional network says of a frame which wallpapers, pictures and things it shows. It is
trained on rendered frames and on what the codec makes of them, so neither is strange to it, and is
examined on rooms that it has not seen.
"""

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .camera import invert, pixel_directions
from .catalogue import (
    CATALOGUE_HELD_OUT_SEED,
    CATALOGUE_SEED,
    NAMES,
    PICTURES,
    THINGS,
    WALLS,
    Choice,
    choose,
    furnished,
    size_of,
)
from .codec import Codec
from .data import draw
from .world import Attributes, Room, cast, make_room, render

# A name counts as shown from this share of the view on.
SHOWN_SHARE = 0.02
_RAYS_A_SIDE = 32
ROOMS = 300
_FIRST_SEED, _HELD_OUT_ROOMS, _EVERY = CATALOGUE_SEED + 5000, 60, 8
_STEPS_A_ROOM, _BATCH, _RATE = 3, 64, 2e-3


class Recogniser(nn.Module):
    """Say of frames `[N, 3, P, P]` in 0..1 how likely each of `NAMES` is shown: `[N, names]`."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(4, b), nn.SiLU())
                for a, b in itertools.pairwise(widths)
            )
        )
        self.head = nn.Linear(2 * widths[-1], len(NAMES))

    def logits(self, frames: Tensor) -> Tensor:
        """Logits `[N, names]`, of the mean of all places and of the most striking one."""
        seen = self.body(frames - 0.5).flatten(2)
        return self.head(torch.cat([seen.mean(-1), seen.amax(-1)], -1))

    def forward(self, frames: Tensor) -> Tensor:
        """Probabilities `[N, names]`."""
        return self.logits(frames).sigmoid()


def _hits(room: Room, w2c: Tensor) -> tuple[Tensor, Tensor]:
    """Surface that rays of views `[F, 4, 4]` meet, and whether on its picture: `[F, rays]`."""
    rays = pixel_directions(_RAYS_A_SIDE, _RAYS_A_SIDE).reshape(-1, 3)
    c2w = invert(w2c)
    direction = torch.cat([rays @ pose[:3, :3].T for pose in c2w])
    origin = c2w[:, :3, 3].repeat_interleave(len(rays), 0)
    distance, axis, surface = cast(room, origin, direction)
    point = origin + direction * distance[:, None]
    row = room.surfaces[surface]
    u = torch.where(axis == 0, point[:, 2], point[:, 0])
    inside = (u - row[:, 14]).abs() < row[:, 16]
    inside &= (point[:, 1] - row[:, 15]).abs() < row[:, 17]
    return surface.view(len(w2c), -1), inside.view(len(w2c), -1)


def shares(seed: int, w2c: Tensor) -> Tensor:
    """Share of each view `[F, 4, 4]` that each name takes in the room of a seed: `[F, names]`."""
    choice = choose(seed)
    surface, picture = _hits(make_room(seed), w2c)
    found = torch.zeros(len(w2c), len(NAMES))
    things = [name for name in choice.things if name is not None]
    for wall, name in zip(WALLS, choice.pictures, strict=True):
        here = surface == wall
        found[:, NAMES.index(choice.wallpaper)] += (here & ~picture).float().mean(-1)
        if name is not None:
            found[:, NAMES.index(name)] += (here & picture).float().mean(-1)
    for i, name in enumerate(things):
        found[:, NAMES.index(name)] += (surface == 6 + i).float().mean(-1)
    return found


def slots(seed: int, w2c: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each view that each place takes, which may hold a picture or a thing.

    Returns `[F, 4]` of the walls' middles, in the room without things, and `[F, 4]` of the
    corners, as if each held a cabinet.
    """
    size = size_of(seed)

    def seen(pictures: str | None, things: str | None) -> tuple[Tensor, Tensor]:
        choice = Choice("plain", (pictures,) * 4, (things,) * 4)
        return _hits(Room(seed, "catalogue", size, *furnished(size, choice)), w2c)

    surface, picture = seen(PICTURES[0], None)
    walls = [((surface == wall) & picture).float().mean(-1) for wall in WALLS]
    surface, _ = seen(None, THINGS[1])
    corners = [(surface == 6 + i).float().mean(-1) for i in range(4)]
    return torch.stack(walls, 1), torch.stack(corners, 1)


@torch.no_grad()
def examples(seeds: range, codec: Codec, every: int = _EVERY) -> tuple[Tensor, Tensor, Tensor]:
    """Render views of rooms: frames `[N, 3, P, P]`, the codec's of them, shares `[N, names]`."""
    frames, named = [], []
    device = codec.latent_mean.device
    for seed in seeds:
        w2c = draw(seed).w2c[seed % every :: every]
        frames.append(render(make_room(seed), w2c.to(device), [Attributes()])[0].cpu())
        named.append(shares(seed, w2c))
    shown = torch.cat(frames)
    again = torch.cat(
        [codec.decode(codec.encode(part.to(device))).cpu() for part in shown.split(200)]
    )
    return shown, again, torch.cat(named)


def train(frames: Tensor, shown: Tensor, steps: int) -> Recogniser:
    """Train on frames `[N, 3, P, P]` and whether they show each name, `[N, names]`.

    The recogniser is made where they are.
    """
    torch.manual_seed(0)
    model = Recogniser().to(frames.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(frames), (_BATCH,), generator=generator).to(frames.device)
        loss = F.binary_cross_entropy_with_logits(model.logits(frames[rows]), shown[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def accuracy(model: Recogniser, frames: Tensor, named: Tensor) -> dict[str, float]:
    """Examine a recogniser: by kind, the share of answers that are right.

    Names that take between none of a view and `SHOWN_SHARE` are not asked for. `balanced` is the
    mean of the share of shown names that are found and of names not shown that are not.
    """
    said = torch.cat([model(part) for part in frames.split(200)]) > 0.5
    shown, absent = named >= SHOWN_SHARE, named == 0
    found, denied = (said & shown).sum(0), (~said & absent).sum(0)
    rates = (found / shown.sum(0).clamp_min(1) + denied / absent.sum(0).clamp_min(1)) / 2
    right = (found.sum() + denied.sum()) / (shown.sum() + absent.sum())
    return {
        "right": round(float(right), 4),
        "balanced": round(float(rates.mean()), 4),
        **{name: round(float(rate), 4) for name, rate in zip(NAMES, rates, strict=True)},
    }


def recogniser_at(path: Path, codec: Codec, rooms: int = ROOMS) -> Recogniser:
    """Load the recogniser of a file, or train it on `rooms` rooms and keep it there.

    It is trained where the codec is, and given on the host.
    """
    model = Recogniser()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval().requires_grad_(False)
    shown, again, named = examples(range(_FIRST_SEED, _FIRST_SEED + rooms), codec)
    wanted = (named >= SHOWN_SHARE).float()
    device = codec.latent_mean.device
    both, wanted = (torch.cat(x).to(device) for x in ([shown, again], [wanted, wanted]))
    model = train(both, wanted, _STEPS_A_ROOM * rooms).cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(model.state_dict(), partial)
    partial.rename(path)
    return model


def examined(model: Recogniser, codec: Codec, rooms: int = _HELD_OUT_ROOMS) -> dict[str, dict]:
    """Examine a recogniser on held-out rooms, as rendered and as the codec shows them."""
    seeds = range(CATALOGUE_HELD_OUT_SEED, CATALOGUE_HELD_OUT_SEED + rooms)
    shown, again, named = examples(seeds, codec)
    return {"rendered": accuracy(model, shown, named), "codec": accuracy(model, again, named)}
