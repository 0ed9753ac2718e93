"""The rollout of the streaming model: four Euler steps a chunk, then one refresh."""

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .model import CHUNK_LATENTS, KeyValue
from .rollout import SIGMAS, Step, chunk_noise
from .stream import StreamWorld


class GrownCache:
    """A cache that `cat` makes longer with every chunk.

    Args:
        limit_chunks: chunks kept at most; None keeps all.
        sink_chunks: first chunks that are kept in any case.

    Attributes:
        held: latents of the rollout that are in the cache, ascending.
        pairs: one (k, v) `[B, H, tokens, D]` a block.
    """

    def __init__(self, limit_chunks: int | None = None, sink_chunks: int = 0) -> None:
        self.limit_chunks, self.sink_chunks = limit_chunks, sink_chunks
        self.held: list[int] = []
        self.pairs: list[KeyValue] | None = None
        self.written = 0

    def forward(
        self, model: Callable, *args, walls: Tensor | None, refresh: bool
    ) -> Tensor | None:
        """Decode a chunk, or leave it in the cache."""
        made = model(*args, self.pairs, walls, refresh=refresh)
        if not refresh:
            return made
        self.pairs = made
        self.held += range(self.written, self.written + CHUNK_LATENTS)
        self.written += CHUNK_LATENTS
        return None

    def make_room(self, w2c: Tensor, least_needed: Callable[[Tensor], int] | None) -> None:
        """Give up a chunk where the limit is passed: the least needed one, or the oldest.

        Args:
            w2c: cameras `[F, 4, 4]` of the rollout.
            least_needed: tells, from the cameras of what is held, where the chunk begins among it.
        """
        if self.limit_chunks is None or len(self.held) <= self.limit_chunks * CHUNK_LATENTS:
            return
        first = self.sink_chunks * CHUNK_LATENTS
        if least_needed is not None:
            first = least_needed(w2c[self.held])
        last = first + CHUNK_LATENTS
        tokens = self.pairs[0][0].shape[2] // len(self.held)
        kept = [*range(first), *range(last, len(self.held))]
        self.pairs = [
            (
                _without(k, first * tokens, last * tokens),
                _without(v, first * tokens, last * tokens),
            )
            for k, v in self.pairs
        ]
        self.held = [self.held[i] for i in kept]

    def forget(self, latents: Sequence[int]) -> None:
        """Give up latents, for good or until they are encoded anew."""
        if not latents:
            return
        lost = set(latents)
        kept = [i for i, latent in enumerate(self.held) if latent not in lost]
        tokens = self.pairs[0][0].shape[2] // len(self.held)
        rows = torch.tensor(kept, dtype=torch.int64).repeat_interleave(tokens) * tokens
        rows += torch.arange(tokens).repeat(len(kept))
        self.pairs = [(k[:, :, rows], v[:, :, rows]) for k, v in self.pairs]
        self.held = [self.held[i] for i in kept]


def _without(x: Tensor, start: int, end: int) -> Tensor:
    return torch.cat([x[:, :, :start], x[:, :, end:]], 2)


class RingCache:
    """A cache of fixed size, written in place: the chunk that comes round replaces the oldest."""

    def __init__(self, model: StreamWorld, chunks: int, batch: int = 1) -> None:
        config = model.config
        self.tokens = CHUNK_LATENTS * config.rows * config.columns
        self.chunks, self.written = chunks, 0
        like = model.embed.weight
        shape = (batch, config.heads, chunks * self.tokens, config.width // config.heads)
        self.pairs = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.blocks]

    @property
    def held(self) -> list[int]:
        """Latents of the rollout beside those of the next chunk, in the order of the slots."""
        oldest = max(0, self.written + 1 - self.chunks)
        chunks = sorted(range(oldest, self.written), key=lambda chunk: chunk % self.chunks)
        return [chunk * CHUNK_LATENTS + i for chunk in chunks for i in range(CHUNK_LATENTS)]

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

    def forget(self, latents: Sequence[int]) -> None:
        """Refuse to give up single latents: what lies in a ring has no place of its own.

        Raises:
            ValueError: there are some.
        """
        if latents:
            raise ValueError(
                f"a ring gives up the oldest chunk, got latents {latents} to forget; use a grown "
                "cache for policies that flush or recache"
            )

    def make_room(self, w2c: Tensor, least_needed: Callable[[Tensor], int] | None) -> None:
        """Nothing to do: the next chunk takes the oldest one's place."""


Cache = GrownCache | RingCache


class _PlainChunk:
    """What the loop asks where there is no session: all is read, every step computes."""

    def __init__(self, context: list[int]) -> None:
        self.context = context

    def steps(self, sigmas: Sequence[float]) -> list[Step]:
        return [Step(*pair, False) for pair in itertools.pairwise(sigmas)]


class StreamedChunk(NamedTuple):
    """One chunk of a stream: its latents `[B, C, 4, Y, X]`, those it read, and what it cost."""

    start: int
    latents: Tensor
    context: list[int]
    steps_computed: int
    seconds: float


@torch.no_grad()
def chunks_of(
    model: Callable,
    text: list[KeyValue] | None,
    given: Tensor,
    w2c: Tensor,
    walls: Tensor | None = None,
    *,
    seed: int,
    cache: Cache,
    session=None,
) -> Generator[StreamedChunk, None, None]:
    """Enter the recorded chunks into the cache, then generate; one chunk at a time.

    Args:
        model: decodes and refreshes.
        text: encoded prompt, one (k, v) a block; None where the session is steered.
        given: recorded latents `[B, C, M, Y, X]`, which enter by a refresh each.
        w2c: cameras `[B, F, 4, 4]`.
        walls: latents of the bare room `[B, C, F, Y, X]`, for a model that is to know its plan.
        seed: of the noise.
        cache: empty.
        session: a `lipass.Session` for a batch of one, or None.
    """
    b, channels, recorded, *grid = given.shape
    past = given[0, :, :0].transpose(0, 1)
    said = text

    def run(x: Tensor, sigma: float, refresh: bool, start: int) -> Tensor | None:
        here = slice(start, start + CHUNK_LATENTS)
        told = None if walls is None else walls[:, :, here].contiguous()
        # A slice has the stride of the whole walk, and graphs are compiled for strides.
        poses = w2c[:, here].clone(memory_format=torch.contiguous_format)
        level = torch.full((b, CHUNK_LATENTS), sigma, device=x.device)
        return cache.forward(model, x, level, poses, said, walls=told, refresh=refresh)

    for start in range(0, w2c.shape[1], CHUNK_LATENTS):
        here = slice(start, start + CHUNK_LATENTS)
        begin, computed = time.perf_counter(), 0
        opened = nullcontext(_PlainChunk(list(cache.held)))
        if session is not None:
            opened = session.chunk(
                poses=w2c[0, :start] if start else None,
                query=w2c[0, here],
                latents=past if start else None,
                held=cache.held,
            )
        with opened as chunk:
            if text is None and not isinstance(chunk, _PlainChunk):
                said = chunk.text
                cache.forget([*chunk.given_up, *chunk.recache])
                for again in chunk.recache[::CHUNK_LATENTS]:
                    cache.written = again
                    known = past[again : again + CHUNK_LATENTS].transpose(0, 1)[None]
                    run(known, 0.0, True, again)
            if start < recorded:
                x = given[:, :, here].contiguous()
            else:
                x = chunk_noise(seed, start, (b, channels, CHUNK_LATENTS, *grid)).to(given)
                for step in chunk.steps(SIGMAS):
                    x = x + (step.sigma_next - step.sigma) * run(x, step.sigma, False, start)
                    computed += not step.reused
            run(x, 0.0, True, start)
            read = chunk.context
        chooses = session is not None and session.config.context is not None
        cache.make_room(w2c[0], session.least_needed if chooses else None)
        past = torch.cat([past, x[0].transpose(0, 1)])
        yield StreamedChunk(start, x, read, computed, time.perf_counter() - begin)


def stream(
    model: Callable,
    text: list[KeyValue] | None,
    given: Tensor,
    w2c: Tensor,
    walls: Tensor | None = None,
    *,
    seed: int,
    cache: Cache,
    session=None,
) -> Tensor:
    """Generate the latents after `given` along `w2c`: `[B, C, F, Y, X]`; see `chunks_of`."""
    made = chunks_of(model, text, given, w2c, walls, seed=seed, cache=cache, session=session)
    return torch.cat([chunk.latents for chunk in made], 2)
