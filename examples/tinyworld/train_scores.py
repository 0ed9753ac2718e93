"""Score trained weights: rollouts of the dense model in held-out rooms, in dB to the renderer.

The sampler, which is right where it is plausible, is scored by what a recogniser names.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from .codec import Codec
from .imagined import judge
from .metrics import psnr_db
from .model import TinyWorld, tokenize
from .recogniser import ROOMS, recogniser_at
from .rollout import roll_out
from .scenario import PATHS, make_scenario
from .stream_scores import way_back
from .train_batches import prompt_of
from .train_progress import write
from .train_recipes import Recipe
from .weights import load_stream, ready


def score(
    recipe: Recipe, weights: Path, folder: Path, device: torch.device,
    progress: Callable[[str, float], None],
) -> dict[str, float]:  # fmt: skip
    """Give the mean of each kind of rollout that a recipe is scored by.

    `folder` has the codec of the weights, and keeps what they are judged with.
    """
    rooms, kinds = recipe.scored
    if recipe.model == "sampler":
        return _named(recipe, weights, folder, device, progress)
    if recipe.model == "stream":
        stream, codec = load_stream(weights, folder, recipe.config)
        stream, codec = stream.to(device), codec.to(device)
        found = {
            f"{chunks} chunks": [
                way_back(stream, codec, room, int(chunks))[0]["psnr_vs_truth_db"] for room in rooms
            ]
            for chunks in kinds
        }
    else:
        model, codec = ready(TinyWorld(recipe.config), weights, folder)
        model, codec = model.to(device), codec.to(device)
        found = {
            str(kind): [
                explored_or_free(model, codec, recipe.pixels, path, str(kind), room)
                for room in rooms
                for path in PATHS
            ]
            for kind in kinds
        }
    for kind, values in found.items():
        progress(kind, statistics.mean(values))
    return {kind: round(statistics.mean(values), 2) for kind, values in found.items()}


@torch.no_grad()
def explored_or_free(
    model: TinyWorld, codec: Codec, pixels: int, path: str, regime: str, room: int
) -> float:
    """Roll one scenario out densely and compare what was generated with the renderer."""
    scenario = make_scenario(path, regime, room, codec, pixels=pixels)
    tokens = tokenize(prompt_of(scenario.attributes))[None].to(scenario.given.device)
    given, walls = scenario.given, scenario.walls
    made = roll_out(model, model.text(tokens), given, scenario.w2c, walls, seed=room)
    shown = codec.decode(made.latents[len(given) :])
    return psnr_db(shown, scenario.truth[len(given) :])


def _named(
    recipe: Recipe, weights: Path, folder: Path, device: torch.device,
    progress: Callable[[str, float], None],
) -> dict[str, float]:  # fmt: skip
    """Share of unseen pictures that a recogniser names, by steps; the other figures are kept."""
    rooms, steps = recipe.scored
    model, codec = ready(TinyWorld(recipe.config), weights, folder)
    model, codec = model.to(device), codec.to(device)
    learned_from = min(ROOMS, recipe.rooms)
    recogniser = recogniser_at(folder / "recogniser.safetensors", codec, learned_from)
    found = judge(model, codec, recogniser, rooms, [int(count) for count in steps])
    write(folder / f"imagined-{weights.stem}.json", found)
    named = {f"{count} steps": found[f"{count} steps"]["pictures"]["named"] for count in steps}
    for kind, value in named.items():
        progress(kind, value)
    return named
