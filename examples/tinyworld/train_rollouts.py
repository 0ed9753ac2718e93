"""Train on pictures of the model's own rollouts, free and explored.

A rollout that goes on from what it imagined must not pass its errors on: the last prediction of
the sampler, in rollouts that advance while the model learns, is compared with the recording.
"""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec
from .model import TinyWorld
from .own_rollouts import OwnRollouts
from .train_batches import Batch, LatentWalks
from .train_pictures import PictureOptions, PictureTrainer
from .train_world import prefill


@dataclass(frozen=True)
class RolloutOptions(PictureOptions):
    """Sizes and rates of the stage.

    A step advances `lanes` rollouts by a chunk, on up to one of `context` latents. `free_share` of
    the rollouts begin with one recorded chunk and end after `free_chunks`; the others begin with
    two to nine and end with their walk.
    """

    lanes: int = 10
    context: tuple[int, ...] = (4, 4, 8, 8, 12, 20)
    free_share: float = 0.6
    free_chunks: int = 6


def imagine(
    model: TinyWorld, batch: Batch, rollouts: OwnRollouts, generator: torch.Generator
) -> Tensor:
    """Generate the next chunk `[B, C, 4, Y, X]` of lanes; its last step alone has a gradient."""
    with torch.no_grad():
        prefilled = prefill(model, batch, generator)
    x = rollouts.noise().to(batch.context.device)
    for sigma, sigma_next in itertools.pairwise(rollouts.sigmas()):
        level = torch.full((len(x), x.shape[2]), sigma, device=x.device)
        with torch.set_grad_enabled(sigma_next == 0):
            velocity = prefilled.velocity(
                x, level, batch.w2c_targets[:, :1], batch.walls_targets[:, :1], prefilled.text
            )
            x = x + (sigma_next - sigma) * velocity
    return x


class RolloutTrainer(PictureTrainer):
    """Trains the chunks of own rollouts."""

    options: RolloutOptions

    def __init__(
        self, model: TinyWorld, codec: Codec, options: RolloutOptions = RolloutOptions()
    ) -> None:
        super().__init__(model, codec, options)

    def begin(self, walks: LatentWalks, seed: int) -> None:
        """Start the rollouts."""
        options = self.options
        self.rollouts = OwnRollouts(
            walks, lanes=4 * options.lanes, batch=options.lanes, targets=1, seed=seed,
            free_share=options.free_share, free_chunks=options.free_chunks,
        )  # fmt: skip

    def imagined(self, model: TinyWorld, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Advance rollouts by a chunk."""
        batch = self.rollouts.draw(draw.choice(self.options.context)).to(self.device)
        chunks = imagine(model, batch, self.rollouts, self.generator)
        self.rollouts.append(chunks.detach())
        return chunks, batch.targets[:, 0].transpose(1, 2)
