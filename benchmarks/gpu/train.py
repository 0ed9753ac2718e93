"""Train a world of TinyWorld for as long as is left, then roll it out dense and accelerated.

`python -m benchmarks.gpu.train base --out FILE` begins with the weights of `small` that the
checkout has, as `sampler` does, `stream` with its own. Weights are copied beside the document
whenever a stage has new ones, so that a limit costs what came after them alone; the same command
on the same machine goes on from there. The sampler is not rolled out: it is judged by what it
imagines.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.part import Part

if TYPE_CHECKING:
    from lipass.examples.tinyworld.train import Training
    from lipass.examples.tinyworld.train_recipes import Recipe

ROOT = Path(__file__).parents[2]
PRESETS = ("off", "sparse", "all")
# What the rollouts may take: three models are compiled for them.
_DEMO_S, _DEMO_SHARE = 110.0, 0.35
# For what is written at the end, and what a stage takes too long.
_SPARE_S = 8.0
# Rooms are rendered first; less is no training.
_LEAST_S = 60.0
_COPY_EVERY_S = 2.0


def main(argv: list[str] | None = None) -> int:
    """Write the card of the training, and a row for each preset that was rolled out."""
    part = Part(argv)
    if reason := _why_not(part):
        part.row(trained=False, reason=reason)
        return 0
    name = part.name or "base"
    left = part.left_s - _SPARE_S
    demo_s = min(_DEMO_S, _DEMO_SHARE * left) if name in ("small", "base") else 0.0
    with _folder(part, name) as folder:
        training = _training(part, name, folder, left - demo_s)
        done = threading.Event()
        copies = threading.Thread(target=_keep, args=(training, part.folder, done), daemon=True)
        copies.start()
        try:
            card = training.run()
        finally:
            done.set()
            copies.join()
            copy_latest(training, part.folder)
        curves = card.pop("loss")
        part.note(card=card, loss=curves)
        scores = card[training.recipe.scores]
        part.row(trained=True, model=name, reached=card["reached"], **scores)
        if demo_s:
            _roll_out(part, training)
    return 0


def _why_not(part: Part) -> str:
    if importlib.util.find_spec("safetensors") is None:
        return "not available: weights are read and written with safetensors, which is missing"
    if part.left_s < _LEAST_S and not part.dry:
        return f"{part.left_s:.0f} s are too few"
    return ""


@contextmanager
def _folder(part: Part, name: str) -> Iterator[Path]:
    """Give a folder in which the next call goes on if this one is cut; a dry run's is its own."""
    if part.dry:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    from lipass.examples.tinyworld.train_recipes import RECIPES

    # What another recipe began does not fit.
    recipe = zlib.crc32(repr(RECIPES[name]).encode())
    folder = ROOT / "build/tinyworld" / f"gpu-{name}-{recipe:08x}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _training(part: Part, name: str, folder: Path, seconds: float) -> Training:
    from lipass.examples.tinyworld.train import Training
    from lipass.examples.tinyworld.train_recipes import RECIPES
    from lipass.examples.tinyworld.weights import SHIPPED

    recipe, processes = RECIPES[name], os.cpu_count() or 1
    if part.dry:
        recipe, seconds, processes = _tiny(recipe), 1.0, 1
    own = SHIPPED / f"{name}.safetensors"
    init = own if own.exists() else SHIPPED / "small.safetensors"
    training = Training(recipe, folder, part.device, seconds, processes, init)
    spent = sum(training.done().values())  # by a call that was cut
    return dataclasses.replace(training, seconds=seconds + spent)


def _tiny(recipe: Recipe) -> Recipe:
    """Keep the stages, on two rooms, with the least of everything."""
    sizes = dataclasses.replace(
        recipe.on_cpu,
        batch=1,
        unseen=dataclasses.replace(recipe.on_cpu.unseen, contexts=1, context=(4,), anchors=1),
        rollouts=dataclasses.replace(recipe.on_cpu.rollouts, lanes=1, context=(4,), anchors=1),
        stream=dataclasses.replace(recipe.on_cpu.stream, chunks=(3,), targets=1, own_chunks=(4,)),
        sampler=dataclasses.replace(recipe.on_cpu.sampler, contexts=1, targets=1),
    )
    kinds = (2,) if recipe.model == "stream" else recipe.scored[1]
    goal = ("2 chunks", 1.0) if recipe.model == "stream" else recipe.goal
    # Long walks and rooms that are judged are always of 64 pixels.
    grid = 8 if recipe.model in ("stream", "sampler") else 2
    return dataclasses.replace(
        recipe, rooms=2, pixels=8 * grid, on_cpu=sizes, scored=(recipe.scored[0][:1], kinds),
        goal=goal,
        config=dataclasses.replace(recipe.config, rows=grid, columns=grid),
    )  # fmt: skip


def _keep(training: Training, folder: Path, done: threading.Event) -> None:
    while not done.wait(_COPY_EVERY_S):
        copy_latest(training, folder)


def copy_latest(training: Training, folder: Path) -> None:
    """Copy the newest weights, all curves and the card out of the folder of a training.

    Weights go to `$OUT` too, from where they come back if the whole call is cut.
    """
    name = f"{training.recipe.model}.safetensors"
    made = [training.out / name, *training.out.glob("*-average.safetensors")]
    made = [path for path in made if path.exists()]
    if made:
        newest = max(made, key=lambda path: path.stat().st_mtime_ns)
        for place in {folder, Path(os.environ.get("OUT") or folder)}:
            _copy(newest, place / name)
    for path in training.out.glob("*-curve.json"):
        _copy(path, folder / f"{training.recipe.model}-{path.name}")
    card = training.out / f"{training.recipe.model}.json"
    if card.exists():
        _copy(card, folder / f"{training.recipe.model}-card.json")


def _copy(path: Path, copied: Path) -> None:
    """Copy a file, whole or not at all, unless it is there."""
    if copied.exists() and copied.stat().st_mtime_ns == path.stat().st_mtime_ns:
        return
    copied.parent.mkdir(parents=True, exist_ok=True)
    partial = copied.with_suffix(".partial")
    shutil.copy2(path, partial)
    partial.replace(copied)


class Narrow(nn.Module):
    """A model in the precision of the kernels for a loop that keeps its latents in fp32."""

    def __init__(self, world: Any) -> None:
        super().__init__()
        self.world, self.dtype = world, world.embed.weight.dtype

    def forward(
        self, latents: Tensor, sigma: Tensor, w2c: Tensor, text: Any, history: Any = None,
        walls: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Call it, and give the velocity in fp32."""
        told = None if walls is None else walls.to(self.dtype)
        made = self.world(latents.to(self.dtype), sigma, w2c, text, history, told)
        return made if history is None else made.float()


@torch.no_grad()
def _roll_out(part: Part, training: Training) -> None:
    """Write the rows of `lipass demo` for a way out and back, in the precision of the kernels."""
    from lipass.examples.tinyworld.compare import Contender, compare
    from lipass.examples.tinyworld.learner import working_copy
    from lipass.examples.tinyworld.model import tokenize
    from lipass.examples.tinyworld.scenario import make_scenario
    from lipass.examples.tinyworld.train_batches import prompt_of
    from lipass.examples.tinyworld.weights import load

    recipe = training.recipe
    world, codec = load(recipe.model, training.out, recipe.config)
    world, codec = working_copy(world.to(part.device), part.dtype), codec.to(part.device)
    model = Narrow(world)
    scene = make_scenario(
        "left/right", "explored", recipe.scored[0][0], codec, pixels=recipe.pixels
    )
    text = world.text(tokenize(prompt_of(scene.attributes))[None].to(part.device))
    contenders = []
    inner = "eager" if part.dry else "inductor"
    for preset in PRESETS:
        # The first of them says how long the others will take.
        if contenders and part.left_s < 1.5 * contenders[0].compile_s + _SPARE_S:
            part.row(preset=preset, left_out="no time was left")
            continue
        contenders.append(Contender(preset, model, inner))  # type: ignore[arg-type]
        contenders[-1].warm_up(scene, text)
    repeats = 1 if part.dry else 3
    rows, _ = compare(contenders, scene, text, codec, repeats, lambda preset: None)
    for row in rows:
        part.row(model=recipe.model, **row)


if __name__ == "__main__":
    sys.exit(main())
