"""Training batches: contexts and target chunks drawn from recorded walks.

Each sample is a chunk of a walk and a context from all of that walk, as retrieval would choose it:
the latents before the chunk, the first one, and others that look the same way. In a fixed share of
the batches the prompt changes on the way: memory holds what was seen under another one.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .camera import relative_to, view_similarity
from .model import CHUNK_LATENTS
from .world import Attributes

CONTEXT_NOISE = 0.15
# Of the batches; half of them change in the context, the others behind all of it.
CHANGE_SHARE = 0.2


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


def latent_walks(rooms: dict[str, Tensor]) -> LatentWalks:
    """Collect what training samples from: `latents [R, VIEWS, F, C, Y, X]`, the bare room last.

    `rooms` has `w2c [R, F, 4, 4]` and `tokens [R, 2, TEXT_TOKENS]` beside them.
    """
    latents, w2c = rooms["latents"], rooms["w2c"]
    similarity = torch.stack([view_similarity(w, w) for w in w2c])
    return LatentWalks(latents[:, :-1], w2c, rooms["tokens"], similarity, latents[:, -1])


@dataclass
class Batch:
    """`B` contexts of `n` latents with `J` target chunks each.

    `context [B, n, C, Y, X]`, `targets [B, J, 4, C, Y, X]`, `w2c_context [B, n, 4, 4]` and
    `w2c_targets [B, J, 4, 4, 4]` relative to the first target view. `tokens [B, TEXT_TOKENS]` is
    the prompt of the targets and of the context from latent `changed_at` on, `earlier_tokens` that
    of the latents in front. `context_noise [B]` is the highest noise level of the context.
    `walls_context` and `walls_targets`, shaped as `context` and `targets`, are latents of the bare
    room, or zeros where the model is not told of it.
    """

    context: Tensor
    targets: Tensor
    w2c_context: Tensor
    w2c_targets: Tensor
    earlier_tokens: Tensor
    tokens: Tensor
    context_noise: Tensor
    walls_context: Tensor
    walls_targets: Tensor
    changed_at: int = 0

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, which need not be waited for."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)


class Sampler:
    """Draws batches whose context is recorded, in any order of time."""

    def __init__(self, walks: LatentWalks, *, batch: int, targets: int, seed: int) -> None:
        self.walks, self.batch, self.targets = walks, batch, targets
        self.generator = torch.Generator().manual_seed(seed)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def draw(self, context_latents: int) -> Batch:
        """Draw a batch with `context_latents` of context."""
        changed_at = self._change(context_latents)
        rows = [self._draw_one(context_latents, changed_at) for _ in range(self.batch)]
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)), changed_at)

    def _change(self, n: int) -> int:
        """Draw the latent of a context of `n` from which on the prompt is that of the targets."""
        kind = float(self._rand())
        if kind > CHANGE_SHARE:
            return 0
        return n if kind < CHANGE_SHARE / 2 else 1 + int(self._rand() * (n - 1))

    def _draw_one(self, n: int, changed_at: int) -> tuple[Tensor, ...]:
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
        shown_under = [1 - variant] * changed_at + [variant] * (n - changed_at)
        w2c = walks.w2c[walk]
        # Half of the samples are not told the walls: memory has to do without them.
        walls = walks.walls[walk].float() * (float(self._rand()) < 0.5)
        return (
            walks.latents[walk, shown_under, chosen].float(),
            torch.stack([walks.latents[walk, variant, s : s + chunk].float() for s in starts]),
            relative_to(w2c[chosen], w2c[start]),
            torch.stack([relative_to(w2c[s : s + chunk], w2c[start]) for s in starts]),
            walks.tokens[walk, 1 - variant],
            walks.tokens[walk, variant],
            torch.tensor(CONTEXT_NOISE),
            walls[chosen],
            torch.stack([walls[s : s + chunk] for s in starts]),
        )
