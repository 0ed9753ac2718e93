"""Long walks with loops: what the streaming model is trained and measured on.

A walk is made of legs: wandering, a full turn, or the way back over the latest leg. Rooms are
small, so places come again after any number of chunks, which is what a long memory is for.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lipass.policy.trajectory import parse_trajectory

from .camera import STEP_DEG, STEP_M, invert
from .codec import Codec
from .model import tokenize
from .train_batches import prompt_of
from .world import Attributes, Room, bare, draw_attributes, make_room, random_walk, render

TRAIN_FRAMES = 128
LEAST_WALKS = 20
_SEED_SHIFT = 3_000_003


@dataclass(frozen=True)
class LongWalk:
    """One recorded walk.

    `latents [F, C, Y, X]` and `walls [F, C, Y, X]` (of the bare room) in half precision, `w2c
    [F, 4, 4]`, `tokens [TEXT_TOKENS]`; `other_latents` and `other_tokens` of the same walk under
    another prompt, if it was recorded so.
    """

    latents: Tensor
    walls: Tensor
    w2c: Tensor
    tokens: Tensor
    other_latents: Tensor | None = None
    other_tokens: Tensor | None = None


def _here(w2c: Tensor) -> tuple[float, float, float]:
    """Tell x, z in metres and yaw in degrees of a camera `[4, 4]`."""
    c2w = invert(w2c)
    yaw = math.degrees(math.atan2(float(c2w[0, 2]), float(c2w[2, 2])))
    return float(c2w[0, 3]), float(c2w[2, 3]), yaw


def walk_with_loops(
    room: Room, frames: int, generator: torch.Generator, step_m: float, step_deg: float
) -> Tensor:
    """Walk in legs that wander, turn round or lead back; returns `w2c [frames, 4, 4]`."""

    def rand(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    walk = random_walk(room, int(rand(16, 48)), generator, None, step_m, step_deg)
    while len(walk) < frames:
        kind, length = rand(0, 1), int(rand(8, 48))
        if kind < 0.35:
            leg = walk[-length - 1 : -1].flip(0)
        elif kind < 0.55:
            steps = max(2, round(360 / step_deg))
            side = "left" if rand(0, 1) < 0.5 else "right"
            turn = parse_trajectory(f"{side}-{steps}", step_deg=360 / steps)
            leg = turn[1:] @ walk[-1]
        else:
            leg = random_walk(room, length, generator, _here(walk[-1]), step_m, step_deg)[1:]
        walk = torch.cat([walk, leg])
    return walk[:frames]


def out_and_back(room: Room, frames: int) -> Tensor:
    """A walk with loops `[frames, 4, 4]` whose second half is the way back over the first."""
    generator = torch.Generator().manual_seed(room.seed * 10 + 7)
    out = walk_with_loops(room, frames // 2, generator, STEP_M, STEP_DEG)
    return torch.cat([out, out.flip(0)])


@torch.no_grad()
def record_walk(seed: int, codec: Codec, frames: int) -> LongWalk:
    """Draw the training walk of a seed, render and encode it where the codec is."""
    generator = torch.Generator().manual_seed(seed + _SEED_SHIFT)
    room = make_room(seed)
    step_m, step_deg = (
        low + (high - low) * float(torch.rand((), generator=generator))
        for low, high in ((0.08, 0.16), (4.5, 9.5))
    )
    w2c = walk_with_loops(room, frames, generator, step_m, step_deg)
    plain = float(torch.rand((), generator=generator)) < 0.3
    attributes = Attributes() if plain else draw_attributes(generator)
    other = draw_attributes(generator)
    seen = w2c.to(codec.latent_mean.device)
    views = render(room, seen, [attributes, other]) + render(bare(room), seen, [Attributes()])
    shown, other_shown, walls = (codec.encode(view).half().cpu() for view in views)
    tokens, other_tokens = (tokenize(prompt_of(one)) for one in (attributes, other))
    return LongWalk(shown, walls, w2c, tokens, other_shown, other_tokens)


def record_walks(
    seeds: range, folder: Path, codec: Codec, seconds: float, progress: Callable[[int], None]
) -> None:
    """Record the walks of `seeds` into `folder`, skipping those that are there.

    Stops when `seconds` are over and there are `LEAST_WALKS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for count, seed in enumerate(seeds):
        path = folder / f"{seed}.pt"
        if not path.exists():
            if count >= LEAST_WALKS and time.monotonic() - begin > seconds:
                break
            partial = path.with_suffix(".partial")
            torch.save(record_walk(seed, codec, TRAIN_FRAMES).__dict__, partial)
            partial.rename(path)
        progress(count + 1)


def load_walks(folder: Path) -> list[LongWalk]:
    """Load the walks that are in `folder` so far, in the order of their seeds."""
    paths = sorted(folder.glob("*.pt"), key=lambda path: int(path.stem))
    return [LongWalk(**torch.load(path)) for path in paths]
