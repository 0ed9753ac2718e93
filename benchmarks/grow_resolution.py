"""Try what it is worth to take early steps on half of the token grid, as SPEED does.

    python -m benchmarks.grow_resolution --json

Spectral progressive growth (arXiv 2605.18736): while a band of frequencies is under its noise, a
step need not compute it. The first steps see 4 x 4 tokens a latent in place of 8 x 8, rotary
positions at the centres of the larger cells and `log 4` on their keys, with the history as it is;
the clean latents that the last of them predicts are made larger by zeros in the high half of their
cosine transform and noised to the next level, as samplers that predict clean latents do. Beside it
stand samplers of fewer steps. What is told: dB to the renderer and to all four steps, cost in full
steps. `switch_time` says when, from the power of a band.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.examples.tinyworld.camera import relative_to
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import (
    CHUNK_LATENTS,
    KeyValue,
    Rotary,
    TinyWorld,
    camera_transforms,
    tokenize,
)
from lipass.examples.tinyworld.rollout import SIGMAS, chunk_noise, retrieve
from lipass.examples.tinyworld.scenario import PATHS, Scenario, make_scenario
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load

RATIO = 2
# Lists of levels, and how many steps are taken on the small grid.
SAMPLERS: dict[str, tuple[tuple[float, ...], int]] = {
    "4 steps": (SIGMAS, 0),
    "1 small, 3 full": (SIGMAS, 1),
    "2 small, 2 full": (SIGMAS, 2),
    "3 small, 1 full": (SIGMAS, 3),
    "3 steps, without the first level": (SIGMAS[1:], 0),
    "3 steps, without the second level": (SIGMAS[:1] + SIGMAS[2:], 0),
    "2 steps, without the first levels": (SIGMAS[2:], 0),
    "2 steps, without the middle levels": (SIGMAS[:1] + SIGMAS[3:], 0),
}


def cosines(n: int) -> Tensor:
    """Orthonormal cosine transform `[n, n]`, frequencies down."""
    k, x = torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)
    table = torch.cos(math.pi * (x + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    table[0] /= math.sqrt(2)
    return table.float()


def lifted(x: Tensor, high: Tensor | None = None, ratio: int = RATIO) -> Tensor:
    """Put planes `[.., Y, X]` on a grid `ratio` times as large, by their cosine transform.

    The transform keeps its numbers, so amplitudes become `1 / ratio` of what they were.

    Args:
        x: the planes.
        high: numbers for the frequencies that the small grid lacks, `[.., rY, rX]`; None is zeros.
        ratio: of the grids.
    """
    rows, columns = x.shape[-2:]
    small = cosines(rows) @ x @ cosines(columns).mT
    large = x.new_zeros(*x.shape[:-2], ratio * rows, ratio * columns) if high is None else high
    large = large.clone()
    large[..., :rows, :columns] = small
    return cosines(ratio * rows).mT @ large @ cosines(ratio * columns)


def larger(x: Tensor, ratio: int = RATIO) -> Tensor:
    """Make clean latents larger; what is constant stays."""
    return ratio * lifted(x, ratio=ratio)


def retimed(t: float, ratio: float = RATIO) -> tuple[float, float]:
    """Gain and noise level of a noisy state behind `lifted` with unit noise times `t` as `high`.

    `gain * (1 - t) / ratio == 1 - level` and `gain * t == level`: signal and noise are again what
    the level says.
    """
    gain = ratio / (1 + (ratio - 1) * t)
    return gain, gain * t


def switch_time(power: float, delta: float) -> float:
    """Noise level below which a band of this power holds more than `delta` of signal.

    With `s = ((1 - t) / t) ** 2 * power`, the band's signal to noise, it is where
    `(1 + power) * s / (1 + s) == delta`; for no tolerance it is 1, and no step is small.
    """
    return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))


def small_steps(sigmas: Sequence[float], switch: float) -> int:
    """Steps in front of the first level at which the grid has to be whole."""
    return next((n for n, sigma in enumerate(sigmas[:-1]) if sigma <= switch), len(sigmas) - 2)


def power_of_band(latents: Tensor) -> float:
    """Mean power of the frequencies of latents `[N, C, Y, X]` where half a grid ends."""
    rows, columns = latents.shape[-2:]
    power = (cosines(rows) @ latents @ cosines(columns).mT).square().mean((0, 1))
    frequency = torch.arange(rows)[:, None].maximum(torch.arange(columns))
    return float(power[frequency == rows // RATIO].mean())


def velocity_on_small_grid(
    model: TinyWorld,
    rotary: Rotary,
    x: Tensor,
    sigma: float,
    w2c: Tensor,
    text: list[KeyValue],
    history: list[KeyValue],
) -> Tensor:
    """Velocity of `[1, C, 4, Y/2, X/2]` under a history on the whole grid."""
    own, level = w2c[:, -CHUNK_LATENTS:], torch.full((1, CHUNK_LATENTS), sigma)
    tokens, rows = model.tokens(x, own, None), model.rows(level, x.dtype)
    cameras = camera_transforms(own)
    for i, block in enumerate(model.blocks):
        shape = block.modulated(rows)
        q, k, v = block.project(tokens, shape, cameras, rotary)
        keys = torch.cat([text[i][0], history[i][0], k], 2)
        values = torch.cat([text[i][1], history[i][1], v], 2)
        bias = x.new_zeros(1, 1, 1, keys.shape[2])
        bias[..., -k.shape[2] :] = math.log(RATIO**2)  # each stands for as many
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        tokens = block.finish(tokens, out, shape, cameras)
    return model.velocity(tokens, x, level)


def generate(
    model: TinyWorld, scenario: Scenario, chunks: int, sigmas: Sequence[float], small: int
) -> Tensor:
    """Latents `[F, C, Y, X]` behind the recorded ones, `small` steps of each on half the grid."""
    given, w2c = scenario.given, scenario.w2c
    text = model.text(tokenize(prompt_of(scenario.attributes))[None])
    config = model.config
    half = (config.rows // RATIO, config.columns // RATIO)
    rotary = Rotary(*half, config.width // config.heads // 2)
    latents = given
    for start in range(len(given), len(given) + chunks * CHUNK_LATENTS, CHUNK_LATENTS):
        query = w2c[start : start + CHUNK_LATENTS]
        kept = retrieve(w2c[:start], query)
        poses = relative_to(torch.cat([w2c[kept], query]), w2c[start])[None]
        clean = latents[kept].transpose(0, 1)[None]
        history = model(clean, torch.zeros(1, len(kept)), poses, text)
        shape = (1, given.shape[1], CHUNK_LATENTS, config.rows, config.columns)
        noise = chunk_noise(scenario.room.seed, start, shape)
        x = noise if small == 0 else noise[..., : half[0], : half[1]]
        for n, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            if n < small:
                v = velocity_on_small_grid(model, rotary, x, sigma, poses, text, history)
            else:
                level = torch.full((1, CHUNK_LATENTS), sigma)
                v = model(x, level, poses, text, history)
            if n == small - 1:
                x = (1 - after) * larger(x - sigma * v) + after * noise
            else:
                x = x + (after - sigma) * v
        latents = torch.cat([latents, x[0].transpose(0, 1)])
    return latents[len(given) :]


@torch.no_grad()
def measure(rooms: Sequence[int], paths: Sequence[str], chunks: int) -> dict[str, object]:
    """Compare all samplers on held-out rooms, explored."""
    model, codec = load()
    power, to_truth, to_whole = [], {n: [] for n in SAMPLERS}, {n: [] for n in SAMPLERS}
    for room in rooms:
        for path in paths:
            scenario = make_scenario(path, "explored", room, codec)
            first = len(scenario.given)
            power.append(power_of_band(scenario.given))
            truth = scenario.truth[first : first + chunks * CHUNK_LATENTS]
            shown = {
                name: codec.decode(generate(model, scenario, chunks, *sampler))
                for name, sampler in SAMPLERS.items()
            }
            for name, frames in shown.items():
                to_truth[name].append(psnr_db(frames, truth))
                to_whole[name].append(psnr_db(frames, shown["4 steps"]))
    band = sum(power) / len(power)
    return {
        "rooms": list(rooms),
        "paths": list(paths),
        "chunks": chunks,
        "power_at_half": round(band, 4),
        "switch_at": {delta: round(switch_time(band, delta), 3) for delta in (0.01, 0.05, 0.1)},
        "samplers": {
            name: {
                "cost_in_full_steps": len(sigmas) - 1 - small * (1 - 1 / RATIO**2),
                "db_to_renderer": round(sum(to_truth[name]) / len(power), 2),
                "db_to_4_steps": round(sum(to_whole[name]) / len(power), 2),
            }
            for name, (sigmas, small) in SAMPLERS.items()
        },
    }


def main() -> None:
    """Print the figures, as text or as one JSON document."""
    parser = argparse.ArgumentParser(description="early steps on half of the token grid")
    parser.add_argument("--rooms", type=int, nargs="+", default=[9001, 9003, 9005])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    found = measure(args.rooms, args.paths, args.chunks)
    if args.json:
        from benchmarks.environment import environment

        print(json.dumps({**found, **environment()}, indent=1))
        return
    print(f"power at half the grid {found['power_at_half']}, switch at {found['switch_at']}")
    for name, figures in found["samplers"].items():
        print(f"{name:36}", *(f"{value:8.2f}" for value in figures.values()))


if __name__ == "__main__":
    main()
