"""What the stages that train pictures share: the loop and the loss.

The velocity loss asks for the mean of all that may follow: where an edge may lie in several places
that is a ramp. These stages decode what the model imagines and take the absolute error, which asks
for the median, in which an edge at an unknown place is still an edge. Recorded contexts keep the
velocity loss beside it, so that what memory determines stays as it was.
"""

import copy
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec
from .learner import Learner, Pace, working_copy
from .model import TinyWorld
from .ranks import rank_of
from .train_batches import LatentWalks, Sampler
from .train_world import faster_dtype, prefill, velocity_loss


@dataclass(frozen=True)
class PictureOptions:
    """Sizes and rates of a stage.

    A step draws, beside what it imagines, `anchors` recorded contexts of one of `anchor_context`
    latents with `anchor_targets` chunks each. `picture_weight` weighs the absolute error of frames
    in 0..1 against the velocity loss of these. The rate falls linearly from `peak_rate`; weights
    are averaged over about `average_steps`.
    """

    anchors: int = 2
    anchor_targets: int = 3
    anchor_context: tuple[int, ...] = (4, 8, 8, 12, 20)
    picture_weight: float = 4.0
    peak_rate: float = 8e-4
    average_steps: int = 200


def picture_error(codec: Codec, chunks: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of the decoded frames of chunks `[B, C, F, Y, X]`, in 0..1.

    `codec` may be of any precision and has no gradient itself.
    """

    def decode(latents: Tensor) -> Tensor:
        frames = latents.transpose(1, 2).flatten(0, 1)
        return codec.decode(frames.to(codec.latent_mean.dtype)).float()

    with torch.no_grad():
        recorded = decode(targets)
    return (decode(chunks) - recorded).abs().mean()


class PictureTrainer(Learner, ABC):
    """Runs a stage under a wall-clock budget; `losses` are those of pictures and velocity.

    A stage says what is imagined: `begin` prepares its sampler, `imagined` draws a batch and gives
    the chunks `[B, C, F, Y, X]` that the model makes of it, with a gradient, and their targets.
    """

    def __init__(self, model: TinyWorld, codec: Codec, options: PictureOptions) -> None:
        super().__init__(model, Pace(options.peak_rate, 30, 1 / 3, options.average_steps))
        self.options = options
        self.codec = copy.deepcopy(codec).to(self.device, torch.bfloat16).requires_grad_(False)

    @abstractmethod
    def begin(self, walks: LatentWalks, seed: int) -> None:
        """Prepare to draw from `walks`."""

    @abstractmethod
    def imagined(self, model: TinyWorld, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Give imagined chunks and their targets; `draw` is the same in all processes."""

    def run(
        self,
        walks: LatentWalks,
        seconds: float,
        progress: Callable[["PictureTrainer"], None],
        checkpoint_s: float = 200,
    ) -> None:
        """Train until `seconds` of training time have passed over all runs."""
        options, (rank, ranks) = self.options, rank_of()
        seed = ranks * self.step + rank
        self.generator.manual_seed(seed)
        self.begin(walks, seed)
        anchors = {"batch": options.anchors, "targets": options.anchor_targets, "seed": seed}
        recorded = Sampler(walks, **anchors)
        example = Sampler(walks, **anchors).draw(options.anchor_context[0]).to(self.device)
        working = working_copy(self.model, faster_dtype(self.model, example))
        saved = time.perf_counter()
        while self.elapsed_s < seconds:
            began_s = time.perf_counter() - self.elapsed_s
            # The same draw in all processes, which wait for each other.
            draw = random.Random(self.step)
            self.refresh(working)
            picture = picture_error(self.codec, *self.imagined(working, draw))
            (options.picture_weight * picture).backward()
            batch = recorded.draw(draw.choice(options.anchor_context)).to(self.device)
            velocity = velocity_loss(
                prefill(working, batch, self.generator), batch, self.generator
            )
            velocity.backward()
            self.learn(working, began_s, seconds, picture, velocity)
            if time.perf_counter() - saved > checkpoint_s or self.elapsed_s >= seconds:
                saved = time.perf_counter()
                self.settle()
                progress(self)
