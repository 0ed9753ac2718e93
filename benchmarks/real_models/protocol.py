"""Ask a session what it decides for each chunk of the paper's walks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import lipass
from lipass.policy.blocks import short_context
from lipass.policy.reference_matrixgame import gate_clip
from lipass.policy.trajectory import parse_trajectory
from lipass.runtime.chunk import Chunk

from .families import Family

# 253 frames are 64 latents: 30 and 33 steps behind the first camera.
WORLDPLAY_WALKS = {"left/right": "left-30, right-33", "forward/back": "w-30, s-33"}
# Four clips one way, 57 + 3 * 40 video frames, and four back.
MATRIX_GAME_WALKS = {"left/right": "left-176, right-160", "forward/back": "w-176, s-160"}
MATRIX_GAME_CLIPS, MATRIX_GAME_FIRST, MATRIX_GAME_PAST = 8, 15, 4
MATRIX_GAME_MEMORY, MATRIX_GAME_ROWS = 5, 20
WORLDPLAY_LATENTS = 20
"""Latents that HY-WORLDPLAY reads by itself: all, or the first 4, 4 that overlap and 12 recent."""


@dataclass(frozen=True)
class Planned:
    """What one chunk reads and computes.

    Attributes:
        context_latents: history latents that it reads.
        steps: denoising steps that compute.
        dense_reason: why its attention stays dense, or None.
        new_latents: that it generates.
        rows_latents: latents that products are made for, where sequences are filled up; 0 is all
            that there are.
    """

    context_latents: int
    steps: int
    dense_reason: str | None
    new_latents: int
    rows_latents: int = 0


def worldplay(
    family: Family, walk: str, options: dict[str, object], *, changing: bool = True
) -> list[Planned]:
    """Plan the 16 chunks of a walk of HY-WorldPlay.

    Args:
        family: for its steps and chunk length.
        walk: pose string.
        options: of the session.
        changing: whether latents of neighbouring chunks have nothing in common, so that the window
            of the adaptive policy is its shortest; otherwise it is its longest. What latents of
            the model do along a walk takes its weights to know.
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
                latents=latents[:start] if start and changing else None,
                own_context=range(min(start, WORLDPLAY_LATENTS)),
            ) as chunk:
                chunk.steps(sigmas)
            planned.append(_planned(chunk, family))
        session.effect.told = True  # no model runs here
    return planned


def matrix_game(family: Family, walk: str, preset: str) -> list[Planned]:
    """Plan the 8 clips of a walk of Matrix-Game-3.0.

    The first clip makes 15 latents, the others 10 behind 4 past ones and their memory: five
    latents as released, which fills sequences up to 20.

    Args:
        family: for its steps and clip length.
        walk: pose string, a step a video frame.
        preset: of the session.
    """
    frames = parse_trajectory(walk, step_m=0.1235, step_deg=1.5)
    latents = frames[::4]  # a latent is the first frame, or four
    released = preset == "reference-matrix-game"
    options: dict[str, object] = {"preset": preset}
    if preset == "all":
        options |= {
            "chunk_latents": family.chunk_latents, "context.window_latents": MATRIX_GAME_PAST,
            "hfov_deg": 90.0, "vfov_deg": 90.0, "far": 30.0,
        }  # fmt: skip
    rows = MATRIX_GAME_ROWS if preset == "off" else 0
    planned = []
    with lipass.Session(**options) as session:
        for clip in range(MATRIX_GAME_CLIPS):
            past = 0 if clip == 0 else MATRIX_GAME_FIRST + family.chunk_latents * (clip - 1)
            new = family.chunk_latents if clip else MATRIX_GAME_FIRST
            cameras, done = (latents, past) if not released else (frames, 4 * past - 3)
            more = new if not released else 4 * new - (3 if clip == 0 else 0)
            own = range(MATRIX_GAME_MEMORY + MATRIX_GAME_PAST) if clip else ()
            with session.chunk(
                poses=cameras[:done] if clip else None,
                query=cameras[max(done, 0) : max(done, 0) + more],
                own_context=own,
            ) as chunk:
                chunk.steps(torch.linspace(1, 0, family.steps + 1))
            read = len(chunk.context)
            if released and clip:  # which keeps picks that come twice
                read = len(gate_clip(frames, clip).latents) + MATRIX_GAME_PAST
            steps = chunk.plan.steps
            why = chunk.plan.dense_reason
            planned.append(Planned(read, len(steps.computed), why, new, rows))
        session.effect.told = True  # no model runs here
    return planned


def _planned(chunk: Chunk, family: Family) -> Planned:
    steps, latents = chunk.plan.steps, len(chunk.context)
    short = short_context(chunk.session.config.sparse, latents, family.latent_tokens)
    why = chunk.plan.dense_reason or short
    return Planned(latents, len(steps.computed), why, family.chunk_latents)
