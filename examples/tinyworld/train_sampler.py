"""Train a model that samples: of what no latent shows, one of the things it may be.

The stages that train pictures ask for the median of what may follow, so one step says nearly all
and most of what is unseen is left out. Here the loss is squared, as flow matching has it: at the
highest level of noise the prediction is a mean of all that may follow, and each step on the way
down the noise decides between fewer of them. That takes things that can be told apart in noise
and learned in the time there is, which rooms of the catalogue have. Recorded contexts keep the
velocity loss beside it, so that what was imagined once is remembered.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .learner import Learner, Pace, normal, uniform, working_copy
from .model import CHUNK_LATENTS, TinyWorld
from .ranks import rank_of
from .train_batches import CONTEXT_NOISE, Batch, LatentWalks, Sampler
from .train_unseen import UnseenSampler
from .train_world import SIGMA_SHIFT, Prefilled, faster_dtype, prefill, velocity_loss

# The least noise is what the sampler's last step begins with, or half of it with eight steps.
_SIGMA_LEAST = 0.3
_PURE_NOISE_SHARE = 0.15


@dataclass(frozen=True)
class SamplerOptions:
    """Sizes and rates of the stage.

    A step takes `contexts` contexts of one of `context` latents with `targets` unseen chunks each,
    and `anchors` recorded contexts of one of `anchor_context` latents with `anchor_targets`
    chunks. `anchor_weight` weighs the velocity loss of these. The rate falls linearly from
    `peak_rate`; weights are averaged over about `average_steps`.
    """

    contexts: int = 4
    targets: int = 4
    context: tuple[int, ...] = (4, 4, 8)
    anchors: int = 1
    anchor_targets: int = 3
    anchor_context: tuple[int, ...] = (8, 12, 20)
    anchor_weight: float = 0.3
    peak_rate: float = 1.5e-3
    average_steps: int = 100


def levels(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw noise levels `[count]` between those that a sampler meets; many are of pure noise."""
    level = uniform((count,), generator, device)
    level = SIGMA_SHIFT * level / (1 + (SIGMA_SHIFT - 1) * level)
    pure = uniform((count,), generator, device) < _PURE_NOISE_SHARE
    return torch.where(pure, torch.ones_like(level), level.clamp_min(_SIGMA_LEAST))


def sampling_loss(prefilled: Prefilled, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error of clean latents, over the level of noise that they were hidden in.

    Between errors of clean latents and of velocities, which ask little of the first steps: these
    decide what is there.
    """
    targets = batch.targets.flatten(0, 1).transpose(1, 2)
    sigma = levels(len(targets), generator, targets.device)
    s = sigma[:, None, None, None, None]
    noise = normal(targets.shape, generator, targets.device)
    velocity = prefilled.velocity(
        (1 - s) * targets + s * noise, sigma[:, None].expand(-1, CHUNK_LATENTS),
        batch.w2c_targets, batch.walls_targets, prefilled.text,
    )  # fmt: skip
    return ((velocity - (noise - targets)).square() * s).mean()


class SamplerTrainer(Learner):
    """Trains a model that samples; `losses` are those of unseen views and of recorded contexts."""

    def __init__(self, model: TinyWorld, options: SamplerOptions = SamplerOptions()) -> None:
        super().__init__(model, Pace(options.peak_rate, 30, 1 / 3, options.average_steps))
        self.options = options

    def run(
        self,
        walks: LatentWalks,
        seconds: float,
        progress: Callable[["SamplerTrainer"], None],
        checkpoint_s: float = 120,
    ) -> None:
        """Train until `seconds` of training time have passed over all runs."""
        options, (rank, ranks) = self.options, rank_of()
        seed = ranks * self.step + rank
        self.generator.manual_seed(seed)
        unseen = UnseenSampler(
            walks, contexts=options.contexts, targets=options.targets, seed=seed
        )
        recorded = Sampler(walks, batch=options.anchors, targets=options.anchor_targets, seed=seed)
        example = unseen.draw(options.context[0]).to(self.device)
        working = working_copy(self.model, faster_dtype(self.model, example))
        saved = time.perf_counter()
        while self.elapsed_s < seconds:
            began_s = time.perf_counter() - self.elapsed_s
            # The same draw in all processes, which wait for each other.
            draw = random.Random(self.step)
            self.refresh(working)
            batch = unseen.draw(draw.choice(options.context))
            # What a rollout remembers is its own, and never quite clean.
            batch.context_noise.fill_(CONTEXT_NOISE)
            batch = batch.to(self.device)
            sampled = sampling_loss(prefill(working, batch, self.generator), batch, self.generator)
            sampled.backward()
            batch = recorded.draw(draw.choice(options.anchor_context)).to(self.device)
            known = velocity_loss(prefill(working, batch, self.generator), batch, self.generator)
            (options.anchor_weight * known).backward()
            self.learn(working, began_s, seconds, sampled, known)
            if time.perf_counter() - saved > checkpoint_s or self.elapsed_s >= seconds:
                saved = time.perf_counter()
                self.settle()
                progress(self)
