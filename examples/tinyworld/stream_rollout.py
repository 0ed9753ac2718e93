"""The rollout of the streaming model: four Euler steps a chunk, then one refresh."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .model import CHUNK_LATENTS, KeyValue
from .rollout import SIGMAS, chunk_noise
from .stream import StreamWorld


class GrownCache:
    """A cache that `cat` makes longer with every chunk.

    `window_chunks` limits what is kept to the latest chunks; None keeps all.
    """

    def __init__(self, window_chunks: int | None = None) -> None:
        self.window_chunks = window_chunks
        self.pairs: list[KeyValue] | None = None

    def forward(
        self, model: Callable, *args, walls: Tensor | None, refresh: bool
    ) -> Tensor | None:
        """Decode a chunk, or leave it in the cache."""
        made = model(*args, self.pairs, walls, refresh=refresh)
        if not refresh:
            return made
        self.pairs = made
        if self.window_chunks is not None:
            kept = self.window_chunks * args[0][0, 0].numel()
            self.pairs = [(k[:, :, -kept:], v[:, :, -kept:]) for k, v in made]
        return None


class RingCache:
    """A cache of fixed size, written in place: the chunk that comes round replaces the oldest."""

    def __init__(self, model: StreamWorld, chunks: int, batch: int = 1) -> None:
        config = model.config
        self.tokens = CHUNK_LATENTS * config.rows * config.columns
        self.chunks, self.written = chunks, 0
        like = model.embed.weight
        shape = (batch, config.heads, chunks * self.tokens, config.width // config.heads)
        self.pairs = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.blocks]

    def forward(
        self, model: Callable, *args, walls: Tensor | None, refresh: bool
    ) -> Tensor | None:
        """Decode a chunk, or leave it in the cache."""
        slot = self.written % self.chunks * self.tokens
        filled = min(self.written + 1, self.chunks) * self.tokens
        made = model(*args, self.pairs, walls, ring=(slot, filled), refresh=refresh)
        if not refresh:
            return made
        self.written += 1
        return None


Cache = GrownCache | RingCache


@torch.no_grad()
def stream(
    model: Callable,
    text: list[KeyValue],
    given: Tensor,
    w2c: Tensor,
    walls: Tensor | None = None,
    *,
    seed: int,
    cache: Cache,
) -> Tensor:
    """Generate the latents after `given [B, C, M, Y, X]` along `w2c [B, F, 4, 4]`.

    `walls [B, C, F, Y, X]` are latents of the bare room, for a model that is to know its plan. The
    chunks of `given` enter the empty `cache` by a refresh each. Returns `[B, C, F, Y, X]`.
    """
    b, channels, recorded, *grid = given.shape
    latents = given
    for start in range(0, w2c.shape[1], CHUNK_LATENTS):
        here = slice(start, start + CHUNK_LATENTS)
        told = None if walls is None else walls[:, :, here]
        poses = w2c[:, here]

        def run(x: Tensor, sigma: float, refresh: bool, poses=poses, told=told) -> Tensor | None:
            level = torch.full((b, CHUNK_LATENTS), sigma, device=x.device)
            return cache.forward(model, x, level, poses, text, walls=told, refresh=refresh)

        if start < recorded:
            x = given[:, :, here].contiguous()
        else:
            x = chunk_noise(seed, start, (b, channels, CHUNK_LATENTS, *grid)).to(given)
            for sigma, after in itertools.pairwise(SIGMAS):
                x = x + (after - sigma) * run(x, sigma, False)
            latents = torch.cat([latents, x], 2)
        run(x, 0.0, True)
    return latents
