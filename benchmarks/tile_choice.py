"""Compare tiles that span four latents with tiles of one, at equal density, on TinyWorld.

    python -m benchmarks.tile_choice > benchmarks/results/tile_choice.json

Budgets are those at which both visit as many key blocks. The model is not timed: its graphs run
without Inductor. Figures are means over explored walks, dB to the dense rollout.
"""

import json
import statistics
from typing import Any

import torch

from benchmarks.environment import environment
from lipass.examples.tinyworld import demo
from lipass.examples.tinyworld.compare import Contender
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.scenario import make_scenario
from lipass.examples.tinyworld.weights import load

WALKS = (("left/right", 9001), ("forward/back", 9001), ("loop", 9001), ("forward/back", 9002))
FOUR = {"sparse.tile": (4, 4, 4), "sparse.query_tile": None}
ONE = {"sparse.tile": (1, 8, 8), "sparse.query_tile": (4, 8, 8)}
# Contexts that are long enough to leave blocks of them out.
POSES = {"sparse": True, "context.memory_latents": 8, "sparse.dense_tokens": 0}
SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("all 20 latents", "sparse", FOUR | {"sparse.budget": 0.15}),
    ("all 20 latents", "sparse", ONE | {"sparse.budget": 0.3}),
    ("chosen by poses", "context", POSES | FOUR | {"sparse.budget": 0.25}),
    ("chosen by poses", "context", POSES | ONE | {"sparse.budget": 0.4}),
]


def rows() -> list[dict[str, Any]]:
    """Roll out every walk under every setting, and dense."""
    model, codec = load()
    scenes = [make_scenario(path, "explored", room, codec) for path, room in WALKS]
    text = model.text(demo.tokenize(demo.prompt_of(scenes[0].attributes))[None])
    off = Contender("off", model, "eager")
    dense = [off.roll_out(scene, text).rollout.latents for scene in scenes]
    found = []
    for context, preset, options in SETTINGS:
        torch._dynamo.reset()
        contender = Contender(preset, model, "eager", **options)
        runs = [contender.roll_out(scene, text) for scene in scenes]
        pictures = [
            psnr_db(*(codec.decode(z)[len(scene.given) :] for z in (run.rollout.latents, plain)))
            for scene, run, plain in zip(scenes, runs, dense, strict=True)
        ]
        found.append(
            {
                "context": context,
                "tile": options["sparse.tile"],
                "budget": options["sparse.budget"],
                "density": round(statistics.mean(run.density for run in runs), 2),
                "db_to_off": round(statistics.mean(pictures), 1),
            }
        )
    return found


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps({"environment": environment(), "rows": rows()}, indent=1))
