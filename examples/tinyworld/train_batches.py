"""Training batches: contexts and target chunks drawn from recorded walks.

Each sample is a chunk of a walk and a context from all of that walk, as retrieval would choose it:
the latents before the chunk, the first one, and others that look the same way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .camera import relative_to, view_similarity
from .model import CHUNK_LATENTS, tokenize
from .world import Attributes

CONTEXT_NOISE = 0.15


@dataclass
class LatentWalks:
    """Latents of all recordings.

    `latents [R, 2, F, C, Y, X]` half precision (two prompts), `w2c [R, F, 4, 4]`,
    `tokens [R, 2, TEXT_TOKENS]`, `similarity [R, F, F]` of every pair of views, `walls
    [R, F, C, Y, X]` the half-precision latents of the bare room.
    """

    latents: Tensor
    w2c: Tensor
    tokens: Tensor
    similarity: Tensor
    walls: Tensor


def prompt_of(attributes: Attributes) -> str:
    """Write the prompt of a room's attributes."""
    return f"a room at {attributes.time} in {attributes.air} air in {attributes.palette} light"


def latent_walks(recordings: list, latents: Tensor) -> LatentWalks:
    """Collect what training samples from; `latents [R, VIEWS, F, C, Y, X]`, the bare room last."""
    w2c = torch.stack([r.w2c for r in recordings])
    tokens = torch.stack(
        [torch.stack([tokenize(prompt_of(a)) for a in r.attributes]) for r in recordings]
    )
    similarity = torch.stack([view_similarity(w, w) for w in w2c])
    return LatentWalks(latents[:, :-1], w2c, tokens, similarity, latents[:, -1])


@dataclass
class Batch:
    """`B` contexts of `n` latents with `J` target chunks each.

    `context [B, n, C, Y, X]`, `targets [B, J, 4, C, Y, X]`, `w2c_context [B, n, 4, 4]` and
    `w2c_targets [B, J, 4, 4, 4]` relative to the first target view, `tokens [B, TEXT_TOKENS]` of
    the context and `target_tokens` of the targets. `context_noise [B]` is the highest noise level
    of the context. `walls_context` and `walls_targets`, shaped as `context` and `targets`, are
    latents of the bare room, or zeros where the model is not told of it.
    """

    context: Tensor
    targets: Tensor
    w2c_context: Tensor
    w2c_targets: Tensor
    tokens: Tensor
    target_tokens: Tensor
    context_noise: Tensor
    walls_context: Tensor
    walls_targets: Tensor


class Sampler:
    """Draws batches whose context is recorded, in any order of time."""

    def __init__(self, walks: LatentWalks, *, batch: int, targets: int, seed: int) -> None:
        self.walks, self.batch, self.targets = walks, batch, targets
        self.generator = torch.Generator().manual_seed(seed)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def draw(self, context_latents: int) -> Batch:
        """Draw a batch with `context_latents` of context."""
        rows = [self._draw_one(context_latents) for _ in range(self.batch)]
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _draw_one(self, n: int) -> tuple[Tensor, ...]:
        walks, chunk = self.walks, CHUNK_LATENTS
        frames = walks.w2c.shape[1]
        walk, variant = int(self._rand() * len(walks.w2c)), int(self._rand() * 2)
        start = chunk + int(self._rand() * (frames - 2 * chunk + 1))
        similarity = walks.similarity[walk]
        recent = list(range(start - chunk, start))
        if float(self._rand()) < 0.3:
            recent = recent[int(self._rand() * 6) :]
        starts = [start]
        near = similarity[start : start + chunk].mean(0)
        for _ in range(self.targets - 1):
            weight = near[: frames - chunk + 1] + 0.05
            starts.append(int(torch.multinomial(weight, 1, generator=self.generator)))
        shown = sorted({i for s in starts for i in range(s, s + chunk)})
        score = similarity[shown].sort(0, descending=True).values[: 2 * chunk].mean(0)
        score = score + 0.35 * self._rand(frames) * float(self._rand())
        score[shown] = -10.0
        score[recent] = -20.0
        if float(self._rand()) < 0.5 and 0 not in shown and 0 not in recent:
            score[0] = 5.0
        chosen = sorted(recent + score.topk(n - len(recent)).indices.tolist())
        # One sample in ten changes its prompt between context and target.
        target_variant = 1 - variant if float(self._rand()) < 0.1 else variant
        w2c = walks.w2c[walk]
        # Half of the samples are not told the walls: memory has to do without them.
        walls = walks.walls[walk].float() * (float(self._rand()) < 0.5)
        return (
            walks.latents[walk, variant, chosen].float(),
            torch.stack(
                [walks.latents[walk, target_variant, s : s + chunk].float() for s in starts]
            ),
            relative_to(w2c[chosen], w2c[start]),
            torch.stack([relative_to(w2c[s : s + chunk], w2c[start]) for s in starts]),
            walks.tokens[walk, variant],
            walks.tokens[walk, target_variant],
            torch.tensor(CONTEXT_NOISE),
            walls[chosen],
            torch.stack([walls[s : s + chunk] for s in starts]),
        )
