"""Ask a session what it decides for each chunk of the paper's walks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import lipass
from lipass.policy.blocks import short_context
from lipass.policy.trajectory import parse_trajectory
from lipass.runtime.chunk import Chunk

from .families import Family

# 253 frames are 64 latents: 30 and 33 steps behind the first camera.
WORLDPLAY_WALKS = {"left/right": "left-30, right-33", "forward/back": "w-30, s-33"}
WORLDPLAY_LATENTS = 20
"""Latents that HY-WORLDPLAY reads by itself: all, or the first 4, 4 that overlap and 12 recent."""


@dataclass(frozen=True)
class Planned:
    """What one chunk reads and computes.

    Attributes:
        context_latents: history latents that it reads.
        steps: denoising steps that compute.
        dense_reason: why its attention stays dense, or None.
    """

    context_latents: int
    steps: int
    dense_reason: str | None


def worldplay(family: Family, walk: str, options: dict[str, object]) -> list[Planned]:
    """Plan the 16 chunks of a walk of HY-WorldPlay.

    The camera never stands, so latents of neighbouring chunks are taken to have nothing in
    common, and the window of the adaptive policy is short.

    Args:
        family: for its steps and chunk length.
        walk: pose string.
        options: of the session.
    """
    w2c = parse_trajectory(walk)
    size = family.chunk_latents
    latents = torch.randn(len(w2c), 16, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, family.steps + 1)
    planned = []
    with lipass.Session(**options) as session:
        for start in range(0, len(w2c) // size * size, size):
            past = w2c[:start] if start else None
            with session.chunk(
                poses=past,
                query=w2c[start : start + size],
                latents=latents[:start] if start else None,
                own_context=range(min(start, WORLDPLAY_LATENTS)),
            ) as chunk:
                chunk.steps(sigmas)
            planned.append(_planned(chunk, family))
        session.effect.told = True  # no model runs here
    return planned


def _planned(chunk: Chunk, family: Family) -> Planned:
    steps, latents = chunk.plan.steps, len(chunk.context)
    short = short_context(chunk.session.config.sparse, latents, family.latent_tokens)
    return Planned(latents, len(steps.computed), chunk.plan.dense_reason or short)
