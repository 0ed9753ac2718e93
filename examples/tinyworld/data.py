"""Training data: recorded walks through many rooms, rendered once and kept as latents.

A recording holds one walk of `FRAMES` cameras in one room under two prompts. Rooms are drawn from
seeds below `HELD_OUT_SEED`; evaluation uses the seeds from there up, so no room, texture or walk
is shared.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipass.policy.trajectory import parse_trajectory

from .world import Attributes, bare, draw_attributes, make_room, place, random_walk, render

FRAMES = 48
# Two prompts and the bare room.
VIEWS = 3


@dataclass(frozen=True)
class Recording:
    """One walk under two prompts, and through the bare room.

    `frames [VIEWS, FRAMES, 3, P, P]` uint8, the bare room last, `w2c [FRAMES, 4, 4]`, `attributes`
    one per prompt.
    """

    seed: int
    frames: np.ndarray
    w2c: Tensor
    attributes: tuple[Attributes, Attributes]


def draw_walk(seed: int, frames: int = FRAMES) -> Tensor:
    """Draw `w2c [frames, 4, 4]`: there and back, a full turn then a walk, or a free walk."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)

    def rand(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    room = make_room(seed)
    step_m, step_deg, kind = rand(0.08, 0.16), rand(4.5, 9.5), rand(0, 1)
    if kind < 0.25:
        out = int(rand(8, frames // 2))
        there, back = ("left", "right") if rand(0, 1) < 0.5 else ("right", "left")
        path = parse_trajectory(
            f"{there}-{out}, {back}-{frames - 1 - out}", step_m=step_m, step_deg=step_deg
        )
        return place(room, path, generator)
    if kind < 0.35:
        out = int(rand(8, frames // 2))
        path = parse_trajectory(f"w-{out}, s-{frames - 1 - out}", step_m=step_m)
        return place(room, path, generator)
    if kind < 0.6:
        turn = int(rand(20, 40))
        path = parse_trajectory(f"left-{turn - 1}", step_deg=360.0 / turn)
        path = place(room, path, generator)
        c2w = torch.linalg.inv(path[-1])
        yaw = float(torch.rad2deg(torch.atan2(c2w[0, 2], c2w[2, 2])))
        start = (float(c2w[0, 3]), float(c2w[2, 3]), yaw)
        walk = random_walk(room, frames - turn + 1, generator, start, step_m, step_deg)
        return torch.cat([path, walk[1:]])
    return random_walk(room, frames, generator, None, step_m, step_deg)


def record(seed: int, pixels: int = 64) -> Recording:
    """Render the recording of one seed."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    walk = draw_walk(seed)
    first = Attributes() if float(torch.rand((), generator=generator)) < 0.3 else None
    attributes = (first or draw_attributes(generator), draw_attributes(generator))
    room = make_room(seed)
    frames = render(room, walk, list(attributes), pixels)
    frames += render(bare(room), walk, [Attributes()], pixels)
    return Recording(
        seed, np.stack([(f * 255 + 0.5).byte().numpy() for f in frames]), walk, attributes
    )


def record_rooms(seeds: range, folder: Path, workers: int, progress) -> None:
    """Render recordings into `folder`, one file a seed, skipping those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in seeds if not (folder / f"{seed}.pt").exists()]
    with ProcessPoolExecutor(workers) as pool:
        for seed, recording in zip(missing, pool.map(record, missing, chunksize=2), strict=True):
            partial = folder / f"{seed}.partial"
            torch.save(recording.__dict__, partial)
            partial.rename(folder / f"{seed}.pt")
            progress(seed)


def load_recordings(folder: Path, seeds: range) -> list[Recording]:
    """Load the recordings of `seeds` that are in `folder`.

    Raises:
        ValueError: recordings of an earlier version, without the bare room.
    """
    paths = (folder / f"{seed}.pt" for seed in seeds)
    recordings = [Recording(**torch.load(p, weights_only=False)) for p in paths if p.exists()]
    if other := {len(r.frames) for r in recordings} - {VIEWS}:
        raise ValueError(
            f"a recording must hold {VIEWS} views of its walk, got {min(other)} in {folder}; "
            "record anew in an empty folder"
        )
    return recordings
