"""Measure what early steps on half of the grid are worth, beside fewer steps of equal cost.

    python -m benchmarks.grow_resolution --json

TinyWorld `small`, and `base` with its weights, whose latents have 16 x 16 tokens; a session has
the first steps of its list computed on half of the grid (`grow.steps`). Cost is counted in FLOPs
of a chunk whose context has 20 latents, encoding it included. `log 4` is added to scores of the
chunk's own keys there, as each stands for four. TinyWorld hardly needs more than one step, so what
many steps gain is computed for latents of which all is known: Gaussian ones with the spectrum of
Wan 2.1, whose best prediction at each frequency is a number. No model is asked there, so it says
what the method may gain, and not what a model is worth on half of its grid.
"""

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lipass
from lipass.config import Config
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import (
    BASE,
    CHUNK_LATENTS,
    SMALL,
    Block,
    KeyValue,
    Rotary,
    TinyWorld,
    tokenize,
)
from lipass.examples.tinyworld.rollout import SIGMAS, roll_out
from lipass.examples.tinyworld.scenario import PATHS, REGIMES, Scenario, make_scenario
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load
from lipass.grow import fit_spectrum
from lipass.policy.growth import grown
from lipass.policy.steps import plan_steps

TWO, ONE = (1.0, 0.625, 0.0), (1.0, 0.0)
# Noise levels, how many first steps are on half of the grid, whether own keys get log 4 there.
SAMPLERS: dict[str, tuple[tuple[float, ...], int, bool]] = {
    "4 steps": (SIGMAS, 0, False),
    "4 steps, 1 on half": (SIGMAS, 1, False),
    "4 steps, 2 on half": (SIGMAS, 2, False),
    "4 steps, 2 on half, log 4": (SIGMAS, 2, True),
    "4 steps, 3 on half": (SIGMAS, 3, False),
    "2 steps": (TWO, 0, False),
    "2 steps, 1 on half": (TWO, 1, False),
    "1 step": (ONE, 0, False),
}
# Sizes, pixels, chunks of a walk.
SIZES = {"small": (SMALL, 64, 4), "base": (BASE, 128, 2)}
# Of Wan 2.1 (arXiv 2605.18736), latents of 480 and 720 lines; its list of levels is shifted by 5.
SPECTRUM = (219.484718, 2.422687)
GRIDS = {"480 lines": (60, 104), "720 lines": (90, 160)}
DELTAS = (0.01, 0.05, 0.1)
STEPS = (50, 4)


class WeighingBlock(Block):
    """A block whose own keys weigh as the tokens that they stand for."""

    def forward(
        self, x: Tensor, rows: Tensor, cameras: tuple[Tensor, Tensor], rotary: Rotary,
        text: KeyValue, history: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:  # fmt: skip
        """Run as `Block` does, with a bias on the keys of half of the grid."""
        if x.shape[2] == math.prod(rotary.grid) or history is None:
            return super().forward(x, rows, cameras, rotary, text, history)
        shape = self.modulated(rows)
        q, k, v = self.project(x, shape, cameras, rotary)
        keys, values = (torch.cat([text[i], history[i], (k, v)[i]], 2) for i in (0, 1))
        bias = x.new_zeros(1, 1, 1, keys.shape[2])
        bias[..., -k.shape[2] :] = math.log(4)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return self.finish(x, out, shape, cameras), (k, v)


def weighing(model: TinyWorld) -> TinyWorld:
    """Copy a model so that it adds log 4 on half of the grid."""
    own = copy.deepcopy(model)
    for block in own.blocks:
        block.__class__ = WeighingBlock
    return own


def generate(
    models: dict[bool, TinyWorld], scenario: Scenario, name: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the latents `[F, C, Y, X]` of a sampler, and which steps were on half of the grid."""
    sigmas, half, weighs = SAMPLERS[name]
    model = models[weighs]
    text = model.text(tokenize(prompt_of(scenario.attributes))[None])
    with lipass.Session(preset="off", grow=True, **{"grow.steps": half}) as session:
        made = roll_out(
            model, text, scenario.given, scenario.w2c, scenario.walls,
            seed=scenario.room.seed, session=session, sigmas=sigmas,
        )  # fmt: skip
    plan = lipass.report().chunks[-1].plan.steps
    assert plan is not None
    return made.latents[len(scenario.given) :], plan.coarse or ()


def cost(models: dict[bool, TinyWorld], scenario: Scenario, name: str) -> int:
    """FLOPs of one chunk whose context has 20 latents."""
    one = shortened(scenario, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        generate(models, one, name)
    return int(counter.get_total_flops())


def shortened(scenario: Scenario, chunks: int) -> Scenario:
    """Cut a walk so that so many chunks are generated."""
    end = len(scenario.given) + chunks * CHUNK_LATENTS
    return replace(
        scenario, w2c=scenario.w2c[:end], truth=scenario.truth[:end], walls=scenario.walls[:end]
    )


@torch.no_grad()
def rows_of(size: str, rooms: Sequence[int], paths: Sequence[str]) -> list[dict[str, object]]:
    """Compare all samplers; a row for each and each regime, means over rooms and paths."""
    config, pixels, chunks = SIZES[size]
    model, codec = load("small", config=config)
    models = {False: model, True: weighing(model)}
    rows: list[dict[str, object]] = []
    for regime in REGIMES:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SAMPLERS}
        latents = []
        for room, path in itertools.product(rooms, paths):
            scenario = make_scenario(path, regime, room, codec, pixels=pixels)
            latents.append(scenario.given)
            scenario = shortened(scenario, chunks)
            truth = scenario.truth[len(scenario.given) :]
            shown: dict[str, Tensor] = {}
            for name in SAMPLERS:
                shown[name] = codec.decode(generate(models, scenario, name)[0])
                pair = psnr_db(shown[name], shown["4 steps"]), psnr_db(shown[name], truth)
                found[name].append(pair)
                said = f"{size} {regime} {room} {path} {name}: {pair[0]:.1f} {pair[1]:.2f}"
                print(said, file=sys.stderr, flush=True)
        if regime == "explored":
            counted = make_scenario(paths[0], regime, rooms[0], codec, pixels=pixels)
            flops = {name: cost(models, counted, name) for name in SAMPLERS}
        amplitude, exponent = fit_spectrum(torch.cat(latents))
        for name, pairs in found.items():
            to_dense, to_truth = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            rows.append(
                {
                    "model": size,
                    "regime": regime,
                    "method": name,
                    "chunks": chunks,
                    "flops_of_4_steps": round(flops[name] / flops["4 steps"], 3),
                    "db_to_4_steps": None if name == "4 steps" else round(to_dense, 2),
                    "db_to_renderer": round(to_truth, 2),
                    "spectrum": [round(amplitude, 4), round(exponent, 4)],
                }
            )
    return rows


def levels(steps: int, shift: float = 5.0) -> list[float]:
    """Noise levels of a flow-matching sampler, shifted towards noise."""
    even = [1 - n / steps for n in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def left_of_noise(power: Tensor, sigmas: Sequence[float], coarse: Sequence[int]) -> Tensor:
    """What Euler's rule makes of one unit of noise at frequencies of the given powers.

    Args:
        power: `[N]`, of clean Gaussian latents; those that half of the grid lacks come first.
        sigmas: noise levels.
        coarse: steps on half of the grid, which predict nothing where it has no frequency.
    """
    lacks = torch.arange(len(power)) < len(power) * 3 // 4
    state = torch.ones_like(power)
    for n, (t, after) in enumerate(itertools.pairwise(sigmas)):
        told = (1 - t) * power / ((1 - t) ** 2 * power + t**2)
        if n in coarse:
            told = told.masked_fill(lacks, 0.0)
        state = state + (after - t) / t * (1 - told) * state
    return state


def powers(grid: tuple[int, int]) -> Tensor:
    """Powers of all frequencies of a grid but the mean, those above half of it first."""
    rows, columns = grid
    shorter = min(grid)
    down, across = (torch.arange(n, dtype=torch.float64) / n for n in grid)
    cycles = torch.hypot(down[:, None], across) * shorter / 2
    high = (down[:, None] >= 0.5) | (across >= 0.5)
    cycles[0, 0] = cycles[0, 1]
    found = SPECTRUM[0] * cycles ** -SPECTRUM[1]
    assert int(high.sum()) == rows * columns * 3 // 4
    return torch.cat([found[high], found[~high]])


def known_latents() -> list[dict[str, object]]:
    """Compare steps on half of the grid with fewer steps, for latents of which all is known."""
    rows: list[dict[str, object]] = []
    for (where, grid), steps, delta in itertools.product(GRIDS.items(), STEPS, DELTAS):
        power, sigmas = powers(grid), levels(steps)
        told = {"grow": True, "grow.delta": delta, "grow.spectrum": SPECTRUM}
        options = Config.resolve("off", {**told, "grow.grid": grid}).grow
        assert options is not None
        plan = plan_steps(steps, None, allowed=False, reason="")
        coarse = grown(plan, options, sigmas).coarse or ()
        took = steps - len(coarse) * 3 / 4
        whole = left_of_noise(power, sigmas, ())
        half, fewer = (
            left_of_noise(power, levels(count), some)
            for count, some in ((steps, coarse), (math.ceil(took), ()))
        )
        rows.append(
            {
                "latents": where,
                "steps": steps,
                "delta": delta,
                "on_half": len(coarse),
                "cost_in_steps": took,
                "db_to_all_steps": _db(half, whole),
                "db_of_high_frequencies": _db(half[: len(power) * 3 // 4], whole),
                "fewer_steps": math.ceil(took),
                "fewer_db_to_all_steps": _db(fewer, whole),
                "fewer_db_of_high_frequencies": _db(fewer[: len(power) * 3 // 4], whole),
            }
        )
    return rows


def _db(state: Tensor, whole: Tensor) -> float | None:
    """Signal to error, over the frequencies that a state holds; None where there is no error."""
    whole = whole[: len(state)]
    error = (state - whole).square().sum() / whole.square().sum()
    return round(float(-10 * error.log10()), 1) if error > 0 else None


def main() -> None:
    """Print the figures, as text or as one JSON document."""
    parser = argparse.ArgumentParser(description="early steps on half of the grid")
    parser.add_argument("--rooms", type=int, nargs="+", default=[9001, 9003, 9005])
    parser.add_argument("--paths", nargs="+", default=["left/right"], choices=PATHS)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in rows_of(size, args.rooms, args.paths)]
    document = {"rooms": args.rooms, "paths": args.paths, "rows": rows,
                "known_latents": known_latents()}  # fmt: skip
    if args.json:
        from benchmarks.environment import environment

        print(json.dumps(document | {"environment": environment()}, indent=1))
        return
    for row in [*rows, *known_latents()]:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
