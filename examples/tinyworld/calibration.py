"""TinyWorld as `lipass calibrate` asks for a model: itself, its loop and walks of training rooms.

    lipass calibrate lipass.examples.tinyworld.calibration:build --default-db 39 --tries 24 \
        --from examples/tinyworld/weights/calibrated.toml \
        --out examples/tinyworld/weights/calibrated.toml

Rooms of tables and tests are others. The mean over all walks is asked for; explored ones have
more. One of them is long and comes back again and again, which needs more memory than the others.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .camera import FOV_DEG
from .compare import QUERY_TILE, TILE, marking_lengths
from .hard_scenes import LONG, scene_of
from .model import tokenize
from .rollout import roll_out
from .scenario import PATHS, REGIMES, Scenario
from .train_batches import prompt_of
from .weights import load

ROOMS = (500, 501)
WALKS = (*itertools.product(PATHS, REGIMES), (LONG, "explored"))
# What is true of the camera and the grid, whatever is found.
OPTIONS = {
    "hfov_deg": FOV_DEG, "vfov_deg": FOV_DEG,
    "sparse.tile": TILE, "sparse.query_tile": QUERY_TILE,
}  # fmt: skip


def build(
    rooms: tuple[int, ...] = ROOMS, walks: Sequence[tuple[str, str]] = WALKS
) -> tuple[Any, Any, dict[str, Scenario], dict[str, Any]]:
    """Return the model, its loop, walks by name, and options that all points share."""
    model, codec = load()
    scenes = [scene_of(path, regime, room, codec) for room in rooms for path, regime in walks]
    with torch.no_grad():
        text = model.text(tokenize(prompt_of(scenes[0].attributes))[None])

    def roll(model: Any, scene: Scenario, session: Any) -> Tensor:
        """Generate one walk; pictures `[F, 3, P, P]` of what was not given."""
        made = roll_out(
            marking_lengths(model), text, scene.given, scene.w2c, scene.walls,
            seed=scene.room.seed, session=session,
        )  # fmt: skip
        return codec.decode(made.latents)[len(scene.given) :]

    named = {f"{one.path}, {one.regime}, room {one.room.seed}": one for one in scenes}
    return model, roll, named, OPTIONS
