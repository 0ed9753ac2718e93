"""The rollout: chunk by chunk, retrieve context, prefill once, take four Euler steps.

This is the loop a user already has. Its own retrieval (`retrieve`) is what runs without lipass;
with a `lipass.Session` the session says which history latents stay and which steps compute.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.grow import smaller

from .camera import relative_to, view_similarity
from .model import CHUNK_LATENTS, KeyValue, TinyWorld

SIGMAS = (1.0, 0.9375, 0.83333333, 0.625, 0.0)
CONTEXT_LATENTS = 20
WINDOW_LATENTS = 12


def retrieve(
    w2c: Tensor, query: Tensor, context: int = CONTEXT_LATENTS, window: int = WINDOW_LATENTS
) -> list[int]:
    """Pick context latents as HY-WorldPlay does: sink, best earlier clips, temporal window.

    Args:
        w2c: cameras of all history latents `[M, 4, 4]`.
        query: cameras of the next chunk `[4, 4, 4]`.
        context: latents in all.
        window: the most recent latents, always kept.
    """
    count = len(w2c)
    if count <= context:
        return list(range(count))
    kept = set(range(CHUNK_LATENTS)) | set(range(count - window, count))
    clips = range(CHUNK_LATENTS, count - window - CHUNK_LATENTS + 1, CHUNK_LATENTS)
    similarity = view_similarity(query, w2c).mean(0)
    score = {clip: float(similarity[clip : clip + CHUNK_LATENTS].mean()) for clip in clips}
    for clip in sorted(score, key=score.__getitem__, reverse=True):
        if len(kept) + CHUNK_LATENTS > context:
            break
        kept |= set(range(clip, clip + CHUNK_LATENTS))
    return sorted(kept)


def chunk_noise(seed: int, start: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of the chunk that begins at latent `start`; equal for every preset."""
    generator = torch.Generator().manual_seed(seed * 100_003 + start)
    return torch.randn(shape, generator=generator)


def generate_chunk(
    model: TinyWorld,
    noise: Tensor,
    sigmas: Tensor,
    context: Tensor,
    w2c: Tensor,
    text: list[KeyValue],
    walls: Tensor | None = None,
) -> Tensor:
    """One whole chunk in one function: prefill, then the denoising loop.

    Args:
        model: the transformer.
        noise: `[B, C, 4, Y, X]`.
        sigmas: noise levels `[steps + 1]`.
        context: clean latents `[B, C, n, Y, X]`.
        w2c: cameras `[B, n + 4, 4, 4]`, context then chunk.
        text: encoded prompt, one (k, v) a block.
        walls: latents of the bare room `[B, C, n + 4, Y, X]`, or None.
    """
    b, _, n = context.shape[:3]
    seen, query = (None, None) if walls is None else (walls[:, :, :n], walls[:, :, n:])
    history = model(context, torch.zeros(b, n, device=noise.device), w2c, text, walls=seen)
    x = noise
    for i in range(sigmas.shape[0] - 1):
        velocity = model(x, sigmas[i].expand(b, CHUNK_LATENTS), w2c, text, history, query)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return x


class Step(NamedTuple):
    """A denoising step of the plain loop."""

    sigma: float
    sigma_next: float
    reused: bool

    def velocity(self, call: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
        """Call the model."""
        return call(x, self.sigma)


@dataclass
class ChunkRecord:
    """What one generated chunk used and cost."""

    start: int
    context: list[int]
    steps_computed: int
    prefill_s: float
    denoise_s: float
    kv_bytes: int


@dataclass
class Rollout:
    """A finished rollout: latents `[F, C, Y, X]` and one record a generated chunk."""

    latents: Tensor
    chunks: list[ChunkRecord] = field(default_factory=list)

    @property
    def dit_core_s(self) -> float:
        """Seconds in prefill and denoising."""
        return sum(c.prefill_s + c.denoise_s for c in self.chunks)


@torch.no_grad()
def roll_out(
    model: Callable,
    text: list[KeyValue] | None,
    given: Tensor,
    w2c: Tensor,
    walls: Tensor | None = None,
    *,
    seed: int,
    session=None,
    retriever: Callable[[Tensor, Tensor], list[int]] = retrieve,
    sigmas: Sequence[float] = SIGMAS,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Generate the latents after `given [M, C, Y, X]` along `w2c [F, 4, 4]`.

    Latents lie where the model is, cameras on the host, which chooses by them. `walls
    [F, C, Y, X]` are latents of the bare room, for a model that is to know its plan. `session` is
    a `lipass.Session` or None; where it is steered, `text` is None. `retriever` is the loop's own
    choice of context, used where no session or its context policy is on. `sigmas` are the noise
    levels of a chunk.
    """
    latents = list(given)
    out = Rollout(given)
    for start in range(len(given), len(w2c), CHUNK_LATENTS):
        query = w2c[start : start + CHUNK_LATENTS]
        noise = chunk_noise(seed, start, (1, given.shape[1], CHUNK_LATENTS, *given.shape[2:]))
        noise = noise.to(given)
        own = retriever(w2c[:start], query)
        if session is None:
            steps = [Step(*pair, False) for pair in itertools.pairwise(sigmas)]
            record, x = run_chunk(model, text, latents, w2c, walls, start, noise, own, steps)
        else:
            with session.chunk(
                poses=w2c[:start], query=query, latents=torch.stack(latents), own_context=own
            ) as chunk:
                steps, kept = chunk.steps(sigmas), chunk.context
                said, memory = (text, None) if text is not None else (chunk.text, chunk.memory)
                record, x = run_chunk(
                    model, said, latents, w2c, walls, start, noise, kept, steps, memory
                )
        out.chunks.append(record)
        latents.extend(x[0].transpose(0, 1))
        if progress is not None:
            progress(start)
    out.latents = torch.stack(latents)
    return out


def run_chunk(
    model: Callable,
    text: list[KeyValue],
    latents: list[Tensor],
    w2c: Tensor,
    walls: Tensor | None,
    start: int,
    noise: Tensor,
    context: list[int],
    steps: Iterable,
    memory: list[tuple[list[KeyValue], list[int]]] | None = None,
) -> tuple[ChunkRecord, Tensor]:
    """Generate the chunk behind `start` latents, and say what it used and cost.

    Args:
        model: the transformer.
        text: encoded prompt.
        latents: the history, one `[C, Y, X]` each.
        w2c: cameras `[F, 4, 4]` of the history and of the chunk behind it.
        walls: latents of the bare room `[F, C, Y, X]`, or None.
        start: where the chunk begins.
        noise: `[1, C, 4, Y, X]`.
        context: latents of the history that are read.
        steps: denoising steps.
        memory: the context in runs, each with the prompt that it was made under, where that
            changes: the model was trained on contexts that are encoded with their own prompt.

    Returns:
        The record, and the latents of the chunk `[1, C, 4, Y, X]`.
    """
    here = slice(start, start + CHUNK_LATENTS)

    def cameras(kept: list[int]) -> Tensor:
        seen = relative_to(torch.cat([w2c[kept], w2c[here]]), w2c[start])[None]
        return seen.to(noise.device)

    def encoded(said: list[KeyValue], kept: list[int]) -> list[KeyValue]:
        if len(kept) == 1 and start > 1:
            # A graph that is compiled for any number is not for one; a neighbour is none too many.
            pairs = encoded(said, [kept[0] - 1 if kept[0] else 1, kept[0]])
            return [(k.chunk(2, 2)[1], v.chunk(2, 2)[1]) for k, v in pairs]
        clean = torch.stack([latents[i] for i in kept], 1)[None]
        seen = None if walls is None else walls[kept].transpose(0, 1)[None]
        level = torch.zeros(1, len(kept), device=clean.device)
        return model(clean, level, cameras(kept), said, None, seen)

    query = None if walls is None else walls[here].transpose(0, 1)[None]
    begin = _now(noise.device)
    runs = [encoded(said, kept) for said, kept in memory or [(text, context)]]
    # One run is copied too: what is joined lies differently, and graphs are compiled for that.
    history = runs[0] if memory is None else [joined(pairs) for pairs in zip(*runs, strict=True)]
    middle = _now(noise.device)
    poses = cameras(context)
    x, computed = noise, 0

    def denoised(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((1, CHUNK_LATENTS), sigma, device=x.device)
        whole = query is None or query.shape[3:] == x.shape[3:]
        return model(x, level, poses, text, history, query if whole else smaller(query))

    for step in steps:
        velocity = step.velocity(denoised, x)
        x = x + (step.sigma_next - step.sigma) * velocity
        computed += not step.reused
    end = _now(noise.device)
    kv_bytes = sum(t.numel() * t.element_size() for pair in history for t in pair)
    record = ChunkRecord(start, context, computed, middle - begin, end - middle, kv_bytes)
    return record, x


def _now(device: torch.device) -> float:
    """Tell the time when all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def joined(pairs: Iterable[KeyValue]) -> KeyValue:
    """Put the keys and values of runs of latents one behind the other."""
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)
