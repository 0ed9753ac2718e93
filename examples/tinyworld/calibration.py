"""TinyWorld as `lipass calibrate` asks for a model: itself, its loop and walks of training rooms.

    lipass calibrate lipass.examples.tinyworld.calibration:build --default-db 37.5 --tries 64 \
        --out examples/tinyworld/weights/calibrated.toml

Rooms of tables and tests are others. The mean over both regimes is asked for; explored has more.
"""

from typing import Any

import torch
from torch import Tensor

from .camera import FOV_DEG
from .compare import QUERY_TILE, TILE, marking_lengths
from .model import tokenize
from .rollout import roll_out
from .scenario import PATHS, REGIMES, Scenario, make_scenario
from .train_batches import prompt_of
from .weights import load

ROOMS = (500, 501)
# What is true of the camera and the grid, whatever is found.
OPTIONS = {
    "hfov_deg": FOV_DEG, "vfov_deg": FOV_DEG,
    "sparse.tile": TILE, "sparse.query_tile": QUERY_TILE,
}  # fmt: skip


def build(
    rooms: tuple[int, ...] = ROOMS, paths: tuple[str, ...] = PATHS
) -> tuple[Any, Any, dict[str, Scenario], dict[str, Any]]:
    """Return the model, its loop, walks by name, and options that all points share."""
    model, codec = load()
    scenes = [
        make_scenario(path, regime, room, codec)
        for room in rooms
        for path in paths
        for regime in REGIMES
    ]
    with torch.no_grad():
        text = model.text(tokenize(prompt_of(scenes[0].attributes))[None])

    def roll(model: Any, scene: Scenario, session: Any) -> Tensor:
        """Generate one walk; pictures `[F, 3, P, P]` of what was not given."""
        made = roll_out(
            marking_lengths(model), text, scene.given, scene.w2c, scene.walls,
            seed=scene.room.seed, session=session,
        )  # fmt: skip
        return codec.decode(made.latents)[len(scene.given) :]

    walks = {f"{one.path}, {one.regime}, room {one.room.seed}": one for one in scenes}
    return model, roll, walks, OPTIONS
