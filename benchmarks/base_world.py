"""Measure what sparse attention gives where a latent has 16 x 16 tokens: TinyWorld `base`.

    python -m benchmarks.base_world --json

At 20 latents its history has 5,120 keys, at 8 latents 2,048. `all` is rolled out with and without
sparse attention, in two tiles at some budgets, beside `off`, one rollout after the other. Until
weights of `base` ship, those of `small` are used on its grid and pixels: positions and rays of
four tokens lie where one of `small` does, and its codec knows no size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.compare import Contender, compare, options_of
from lipass.examples.tinyworld.model import BASE, TinyWorld, tokenize
from lipass.examples.tinyworld.scenario import PATHS, Scenario, make_scenario
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import SHIPPED, load

PIXELS = 128
BUDGETS = (0.3, 0.5)
# Tiles of a latent, as the presets of `small` have them, and tiles that span a chunk.
TILES: dict[str, dict[str, Any]] = {
    "1x8x8": {"sparse.tile": (1, 8, 8), "sparse.query_tile": (4, 8, 8)},
    "4x4x4": {"sparse.tile": (4, 4, 4), "sparse.query_tile": None},
}


def methods(budgets: tuple[float, ...], inner: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Presets and all of their options by name."""
    everything = options_of("all", inner)
    dense = {name: value for name, value in everything.items() if not name.startswith("sparse.")}
    found = {
        "off": ("off", options_of("off", inner)),
        "all, dense attention": ("all", dense | {"sparse": False}),
        "all": ("all", everything),
    }
    for tile, own in TILES.items():
        for budget in budgets:
            asked = own | {"sparse.budget": budget, "sparse.dense_tokens": 0}
            found[f"all, {tile}, {budget}"] = ("all", everything | asked)
    return found


def weights() -> tuple[str, TinyWorld, Codec]:
    """Load `base` if it ships, else `small` on its grid."""
    name = "base" if (SHIPPED / "base.safetensors").exists() else "small"
    return name, *load(name, config=BASE)


@torch.no_grad()
def rows(
    model: TinyWorld, codec: Codec, scenes: list[Scenario],
    chosen: dict[str, tuple[str, dict[str, Any]]], inner: str, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Roll out every scene by every method; a row each, `method` its name."""
    torch._dynamo.config.recompile_limit = 8 * len(chosen)
    text = model.text(tokenize(prompt_of(scenes[0].attributes))[None])
    contenders = []
    for name, (preset, options) in chosen.items():
        contenders.append(Contender(preset, model, inner, options))
        contenders[-1].preset = name
        contenders[-1].warm_up(scenes[0], text)
        print(f"compiled {name}", file=sys.stderr, flush=True)
    found = []
    for scene in scenes:
        made, _ = compare(contenders, scene, text, codec, repeats, lambda name: None)
        for row in made:
            found.append({"method": row.pop("preset"), **row})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Print one document, or a line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rooms", type=int, nargs="+", default=[9001])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--weights", type=Path, help="a folder of an own training of base")
    args = parser.parse_args()
    if args.weights:
        name, (model, codec) = str(args.weights), load("base", args.weights)
    else:
        name, model, codec = weights()
    scenes = [
        make_scenario(path, "explored", room, codec, pixels=PIXELS)
        for room in args.rooms for path in args.paths
    ]  # fmt: skip
    chosen = methods(tuple(args.budgets), args.inner)
    found = rows(model, codec, scenes, chosen, args.inner, args.repeats)
    if args.json:
        document = {"environment": environment(), "weights": name, "rows": found}
        print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
