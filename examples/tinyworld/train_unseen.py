"""Train what the model imagines at once: views of a walk that its context does not overlap.

The bare walls say where every corner is, though no latent of the context shows it. The context is
one or two recorded chunks, the targets look elsewhere, and what is compared with the recording is
the sampler's first prediction or the one at its last noise level: what `train_rollouts` trains, at
a fraction of its cost.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .camera import relative_to
from .codec import Codec
from .learner import normal
from .model import CHUNK_LATENTS, TinyWorld
from .rollout import SIGMAS
from .train_batches import Batch, LatentWalks
from .train_pictures import PictureOptions, PictureTrainer
from .train_world import prefill

# Views farther apart than a chunk's are more to learn from at the same cost.
_LATENTS_APART = (1, 1, 2, 4)


@dataclass(frozen=True)
class UnseenOptions(PictureOptions):
    """Sizes and rates of the stage.

    A step takes `contexts` contexts of one of `context` latents with `targets` unseen chunks each.
    `share_last` of the steps ask for the sampler's prediction at its last level of noise, the
    others for the first.
    """

    contexts: int = 6
    targets: int = 2
    context: tuple[int, ...] = (4, 4, 8)
    share_last: float = 0.35
    peak_rate: float = 1.2e-3
    average_steps: int = 150


class UnseenSampler:
    """Draws contexts of successive latents, and targets in other parts of their walk."""

    def __init__(self, walks: LatentWalks, *, contexts: int, targets: int, seed: int) -> None:
        self.walks, self.contexts, self.targets = walks, contexts, targets
        self.generator = torch.Generator().manual_seed(seed)

    def _rand(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def draw(self, context_latents: int) -> Batch:
        """Draw a batch with `context_latents` of context."""
        rows = [self._draw_one(context_latents) for _ in range(self.contexts)]
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _draw_one(self, n: int) -> tuple[Tensor, ...]:
        walks = self.walks
        frames = walks.w2c.shape[1]
        walk, variant = int(self._rand() * len(walks.w2c)), int(self._rand() * 2)
        first = int(self._rand() * (frames - n + 1))
        unseen = 1 - walks.similarity[walk, first : first + n].amax(0)
        apart = _LATENTS_APART[int(self._rand() * len(_LATENTS_APART))]
        span = apart * (CHUNK_LATENTS - 1) + 1
        weight = unseen.unfold(0, span, 1).mean(-1) ** 4 + 0.01
        starts = torch.multinomial(weight, self.targets, generator=self.generator).tolist()
        chosen = [list(range(start, start + span, apart)) for start in starts]
        w2c, latents, walls = walks.w2c[walk], walks.latents[walk, variant], walks.walls[walk]
        origin, tokens = w2c[starts[0]], walks.tokens[walk, variant]
        return (
            latents[first : first + n].float(),
            torch.stack([latents[c].float() for c in chosen]),
            relative_to(w2c[first : first + n], origin),
            torch.stack([relative_to(w2c[c], origin) for c in chosen]),
            tokens,
            tokens,
            torch.tensor(0.0),
            walls[first : first + n].float(),
            torch.stack([walls[c].float() for c in chosen]),
        )


def predict(model: TinyWorld, batch: Batch, generator: torch.Generator, *, last: bool) -> Tensor:
    """Predict all targets `[B * J, C, 4, Y, X]` from noise, or at the sampler's last level."""
    prefilled = prefill(model, batch, generator)
    device = batch.context.device
    shape = batch.targets.flatten(0, 1).transpose(1, 2).shape

    def velocity(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((shape[0], CHUNK_LATENTS), sigma, device=device)
        return prefilled.velocity(x, level, batch.w2c_targets, batch.walls_targets, prefilled.text)

    x, sigma = normal(shape, generator, device), SIGMAS[0]
    if last:
        with torch.no_grad():
            x = x + (SIGMAS[-2] - sigma) * velocity(x, sigma)
        sigma = SIGMAS[-2]
    return x - sigma * velocity(x, sigma)


class UnseenTrainer(PictureTrainer):
    """Trains views that the context does not overlap."""

    options: UnseenOptions

    def __init__(
        self, model: TinyWorld, codec: Codec, options: UnseenOptions = UnseenOptions()
    ) -> None:
        super().__init__(model, codec, options)

    def begin(self, walks: LatentWalks, seed: int) -> None:
        """Start the sampler."""
        options = self.options
        self.unseen = UnseenSampler(
            walks, contexts=options.contexts, targets=options.targets, seed=seed
        )

    def imagined(self, model: TinyWorld, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Predict unseen views; one of each chunk, since the others are much alike."""
        batch = self.unseen.draw(draw.choice(self.options.context)).to(self.device)
        last = draw.random() < self.options.share_last
        chunks = predict(model, batch, self.generator, last=last)
        shown = draw.randrange(CHUNK_LATENTS)
        targets = batch.targets.flatten(0, 1).transpose(1, 2)
        return chunks[:, :, shown : shown + 1], targets[:, :, shown : shown + 1]
