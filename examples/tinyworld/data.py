"""Training data: walks through many rooms, rendered and encoded once and kept as latents.

A walk has `FRAMES` cameras in one room under two prompts. Rooms are drawn from seeds below
`HELD_OUT_SEED`; evaluation uses the seeds from there up, so no room, texture or walk is shared.
On a CPU several processes draw, render and encode. A GPU renders and encodes itself, as pictures
made by the host would keep it waiting; drawing walks takes one process little time beside that.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lipass.policy.trajectory import parse_trajectory

from .catalogue import CATALOGUE_SEED
from .codec import Codec
from .model import tokenize
from .train_batches import prompt_of
from .world import Attributes, bare, draw_attributes, make_room, place, random_walk, render

FRAMES = 48
# Two prompts and the bare room.
VIEWS = 3
# Rooms that are kept in one file.
BLOCK = 20

Map = Callable[[Callable[[int], Any], Sequence[int]], Iterator[Any]]


class Walk(NamedTuple):
    """Cameras `[FRAMES, 4, 4]` in the room of a seed, and its light, one a prompt."""

    seed: int
    w2c: Tensor
    attributes: tuple[Attributes, Attributes]


def draw_walk(seed: int, frames: int) -> Tensor:
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


def draw(seed: int) -> Walk:
    """Draw the walk of a seed and its two prompts."""
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    plain = float(torch.rand((), generator=generator)) < 0.3 or seed >= CATALOGUE_SEED
    first = Attributes() if plain else None
    attributes = (first or draw_attributes(generator), draw_attributes(generator))
    return Walk(seed, draw_walk(seed, FRAMES), attributes)


def shown(walk: Walk, pixels: int, device: torch.device, every: int = 1) -> Tensor:
    """Render each `every`-th camera, `[VIEWS, F, 3, P, P]` in 0..1, the bare room last."""
    room, w2c = make_room(walk.seed), walk.w2c[::every].to(device)
    frames = render(room, w2c, list(walk.attributes), pixels)
    return torch.stack(frames + render(bare(room), w2c, [Attributes()], pixels))


@torch.no_grad()
def recorded(walk: Walk, codec: Codec, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Render a walk and encode it, where the codec is, in each of `sizes`, the largest first.

    Returns `w2c [FRAMES, 4, 4]`, `tokens [2, TEXT_TOKENS]` and, by their size in pixels, the
    latents `[VIEWS, FRAMES, C, Y, X]` in half precision, all on the host.
    """
    frames = shown(walk, sizes[0], codec.latent_mean.device).flatten(0, 1)
    tokens = torch.stack([tokenize(prompt_of(one)) for one in walk.attributes])
    found = {"w2c": walk.w2c, "tokens": tokens}
    for size in sizes:
        small = frames if size == sizes[0] else F.avg_pool2d(frames, sizes[0] // size)
        found[str(size)] = codec.encode(small).half().unflatten(0, (VIEWS, -1)).cpu()
    return found


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """Give a `map` over seeds by `count` processes, in order; one means this process.

    They are started from a clean one: a process that has run kernels on several threads or on a
    GPU cannot be forked.
    """
    if count == 1:
        yield lambda function, seeds: map(function, seeds)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as pool:
        yield functools.partial(pool.map, chunksize=2)


@functools.cache
def codec_at(path: Path) -> Codec:
    """Load the codec of a file, once a process."""
    codec = Codec()
    codec.load_state_dict(load_file(path))
    return codec.eval().requires_grad_(False)


def _drawn_and_recorded(seed: int, codec: Path, sizes: Sequence[int]) -> dict[str, Tensor]:
    return recorded(draw(seed), codec_at(codec), sizes)


def record(
    seeds: range,
    folder: Path,
    codec: Path,
    sizes: Sequence[int],
    device: torch.device,
    processes: int,
    seconds: float,
    progress: Callable[[int], None],
) -> int:
    """Record the rooms of `seeds` into `folder`, in files of `BLOCK`, skipping what is there.

    Stops behind the file at which `seconds` are over, and never before the first.

    Returns:
        How many rooms there are now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin, count = time.monotonic(), 0
    with workers(processes if device.type == "cpu" else 1) as over:
        for first in seeds[::BLOCK]:
            block = [seed for seed in range(first, first + BLOCK) if seed in seeds]
            path = folder / f"{first}.pt"
            if not path.exists():
                if count and time.monotonic() - begin > seconds:
                    break
                _write(path, _rows(block, codec, sizes, device, over))
            count += len(block)
            progress(count)
    return count


def _rows(
    block: list[int], codec: Path, sizes: Sequence[int], device: torch.device, over: Map
) -> dict[str, Tensor]:
    if device.type == "cpu":
        rows = list(over(functools.partial(_drawn_and_recorded, codec=codec, sizes=sizes), block))
    else:
        here = codec_at(codec).to(device)
        rows = [recorded(walk, here, sizes) for walk in over(draw, block)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def frames_of(
    seeds: range, pixels: int, every: int, device: torch.device, processes: int
) -> Tensor:
    """Render pictures for the codec, under both prompts: `[N, 3, P, P]` uint8 on the host."""
    made = functools.partial(_pictures, pixels=pixels, every=every)
    with workers(processes if device.type == "cpu" else 1) as over:
        if device.type == "cpu":
            return torch.cat(list(over(made, seeds)))
        return torch.cat([made(walk, device=device) for walk in over(draw, seeds)])


@torch.no_grad()
def _pictures(
    walk: Walk | int, pixels: int, every: int, device: torch.device | None = None
) -> Tensor:
    walk = draw(walk) if isinstance(walk, int) else walk
    frames = shown(walk, pixels, device or torch.device("cpu"), every)[: VIEWS - 1]
    return (frames.flatten(0, 1) * 255 + 0.5).byte().cpu()


def load(folder: Path, size: int) -> dict[str, Tensor]:
    """Load all rooms of `folder`: `latents [R, VIEWS, F, C, Y, X]` of a size, `w2c`, `tokens`."""
    blocks = [torch.load(path) for path in sorted(folder.glob("*.pt"), key=_first)]
    names = {"latents": str(size), "w2c": "w2c", "tokens": "tokens"}
    return {name: torch.cat([block[key] for block in blocks]) for name, key in names.items()}


def _first(path: Path) -> int:
    return int(path.stem)


def _write(path: Path, value: Any) -> None:
    """Save a file, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.rename(path)
