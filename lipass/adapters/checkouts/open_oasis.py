"""Build a small open-oasis from a checkout, and generate frames as its script does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from lipass.adapters.checkouts.imports import imported_from
from lipass.adapters.checkouts.subject import Ran, Subject
from lipass.receipt import ChunkRecord
from lipass.session import Session

WINDOW, STEPS = 5, 2
OPTIONS = {
    "chunk_latents": 1, "context.sink_latents": 1, "context.window_chunks_min": 1,
    "context.window_chunks_max": 2,
}  # fmt: skip
# what the transformer itself computes with
NEEDED = ("einops", "timm")
_LATENT, _ACTIONS = (16, 8, 16), 25
_KEPT_LEVEL, _LEVELS = 14, 1000


def build(checkout: Path, layers: int = 2) -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights."""
    with imported_from(checkout, NEEDED, "dit.py") as stubbed:
        module = import_module("dit")
    torch.manual_seed(0)
    model = module.DiT(
        input_h=_LATENT[1], input_w=_LATENT[2], in_channels=_LATENT[0], hidden_size=32,
        depth=layers, num_heads=2, external_cond_dim=_ACTIONS, max_frames=WINDOW,
    )  # fmt: skip
    for parameter in model.parameters():  # some start at zero and would hide a wrong gate
        if parameter.requires_grad:  # frequencies stay what they are
            nn.init.normal_(parameter, std=0.1)
    return Subject(
        family="open_oasis",
        model=model.eval().requires_grad_(False),
        rollout=rollout,
        seen=_seen,
        expected=_expected,
        options=OPTIONS,
        stubbed=tuple(stubbed),
        leaves_out=frozenset({"frames"}),
    )


def rollout(
    model: Callable[..., Tensor], session: Session | None, chunks: int
) -> Iterator[Tensor]:
    """Yield the latent of each frame behind a first one: a user's own loop."""
    draw = torch.Generator().manual_seed(3)
    actions = torch.randn(1, chunks + 1, _ACTIONS, generator=draw)
    frames = torch.randn(1, 1, *_LATENT, generator=draw)
    levels = [step / STEPS for step in range(STEPS, -1, -1)]
    for index in range(1, chunks + 1):
        x = torch.randn(1, 1, *_LATENT, generator=draw).clamp(-20, 20)
        call = functools.partial(_velocity, model, frames, actions)
        if session is None:
            read = list(range(max(0, index + 1 - WINDOW), index))
            for now, following in itertools.pairwise(levels):
                x = _step(call(read, x, now), x, now, following)
        else:
            with session.chunk(latents=frames[0]) as chunk:
                for step in chunk.steps(levels):
                    velocity = call(chunk.context, x, step.sigma)
                    x = _step(velocity, x, step.sigma, step.sigma_next)
        frames = torch.cat([frames, x], 1)
        yield x.transpose(1, 2)


def _velocity(
    model: Callable[..., Tensor],
    frames: Tensor,
    actions: Tensor,
    read: Sequence[int],
    x: Tensor,
    level: float | Tensor,
) -> Tensor:
    """Predict for a frame behind those of `read`, which are nearly clean."""
    levels = torch.full((1, len(read) + 1), _KEPT_LEVEL)
    levels[:, -1] = _index(level)
    seen = torch.cat([frames[:, list(read)], x], 1)
    return model(seen, levels, actions[:, [*read, frames.shape[1]]])[:, -1:]


def _step(velocity: Tensor, x: Tensor, now: float | Tensor, following: float | Tensor) -> Tensor:
    """Take a step of DDIM from one level to the next; the last one leaves no noise."""
    kept, then = _signal(now), _signal(following)
    clean = kept.sqrt() * x - (1 - kept).sqrt() * velocity
    noise = (x / kept.sqrt() - clean) / (1 / kept - 1).sqrt()
    return then.sqrt() * clean + (1 - then).sqrt() * noise


def _index(level: float | Tensor) -> int:
    return round(float(level) * _LEVELS) - 1


def _signal(level: float | Tensor) -> Tensor:
    """Return how much of a frame is there at a level, 1 at level 0."""
    return torch.tensor(1 - 0.99 * max(0.0, float(level)))


def _seen(operator: str, shapes: Sequence[Sequence[int]]) -> int | None:
    """Read the frames of a call from its patch embedding, `[B * T, C, Y, X]`."""
    return shapes[0][0] if operator == "aten::conv2d" else None


def _expected(record: ChunkRecord) -> Ran:
    """Say what a frame runs: each step over the frames that it reads, and itself."""
    calls = STEPS - record.steps_skipped
    return Ran(calls, calls * (len(record.plan.context.indices) + 1))
