"""Time a chunk through one block of a family's widths on a CPU, under each preset, in turn.

The block is ours: its products are those of the release, with random weights; what is around them
is as in all such models. So the time of a whole model can be guessed from it, its pictures cannot.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lipass
from lipass.adapters.checkouts.poses import there_and_back
from lipass.runtime.chunk import Chunk

from .attended import grid_of
from .families import Family
from .rows import PRESETS, options_of

# Latents of the chunk and of its history, and steps, at most; one clip a call reuses none.
_NEW, _HISTORY, _STEPS, _STEPS_OF_A_CLIP = 8, 16, 4, 2


class Block(nn.Module):
    """Attention, text, rays and MLP over latents `[1, C, T, Y, X]`, `C` the family's width."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        width, inner = family.width, family.attention_width
        self.family = family
        self.qkv, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        spent = 4 * width * inner
        self.of_text = nn.Linear(width, 2 * inner)
        if not family.joint_text:
            self.text_q, self.text_out = nn.Linear(width, inner), nn.Linear(inner, width)
            spent += 2 * width * inner
        hidden = (family.token_weights - spent) // (2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        rows, kept = family.row_weights // width, family.kept_weights // width
        self.rows = nn.Linear(width, rows) if rows else None
        self.kept = nn.Linear(width, kept) if kept else None

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        text: Tensor,
        rays: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        encode: bool = False,
    ) -> Any:
        """Return what the block makes of latents, or the keys and values that it reads later."""
        frames, tokens = x.shape[2], x.flatten(2).transpose(1, 2)
        y = F.layer_norm(tokens, tokens.shape[2:])
        if self.rows is not None:
            told = level.expand(1, frames, y.shape[2])
            told = told.repeat_interleave(y.shape[1] // frames, 1)
            y = y * (1 + sum(self.rows(told).split(y.shape[2], 2)))
        q, k, v = self._heads(self.qkv(y), 3)
        words_k, words_v = self._heads(self.of_text(text), 2)
        if self.family.streams > 1:
            q, k, v = (torch.cat([one, one.flip(-1)]) for one in (q, k, v))
            words_k, words_v = (one.repeat(2, 1, 1, 1) for one in (words_k, words_v))
        own = (k, v)
        pieces = [own] if past is None else [past, own]
        if self.family.joint_text:
            pieces = [(words_k, words_v), *pieces]
        keys, values = (torch.cat(list(one), 2) for one in zip(*pieces, strict=True))
        o = F.scaled_dot_product_attention(q, keys, values)
        tokens = tokens + self.out(o.transpose(1, 2).flatten(2)).sum(0, keepdim=True)
        if not self.family.joint_text:
            (q,) = self._heads(self.text_q(tokens), 1)
            o = F.scaled_dot_product_attention(q, words_k, words_v)
            tokens = tokens + self.text_out(o.transpose(1, 2).flatten(2))
        if self.kept is not None:
            tokens = tokens + sum(self.kept(rays).split(tokens.shape[2], 2))
        tokens = tokens + self.mlp(F.layer_norm(tokens, tokens.shape[2:]))
        return own if encode else tokens.transpose(1, 2).reshape(x.shape)

    def _heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        heads = x.unflatten(2, (count, self.family.heads, -1))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


def time_block(
    family: Family,
    *,
    latent_grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    inner: str = "inductor",
    repeats: int = 3,
) -> dict[str, object]:
    """Time a chunk that comes back to what was seen: its context once, then its steps.

    Args:
        family: its widths, and what a chunk reads.
        latent_grid: tokens of one latent; None is what fits a CPU.
        dtype: of weights and latents.
        inner: compiler behind the passes.
        repeats: chunks of each preset, in turn; the medians count.
    """
    torch.manual_seed(0)
    block = Block(family).to(dtype).eval().requires_grad_(False)
    trial = Trial(family, latent_grid or grid_of(family), dtype)
    runs: dict[str, Callable[[], Chunk]] = {}
    times: dict[str, list[float]] = {preset: [] for preset in PRESETS}
    done: dict[str, dict[str, int]] = {}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for preset in PRESETS:
            options = options_of(preset, family)
            if lipass.Config.resolve(None, options).steps is not None:
                options["chunk_latents"] = trial.new
            fast = torch.compile(
                block, backend="light_interaction", options={**options, "inner": inner}
            )
            runs[preset] = functools.partial(trial.chunk, fast, options)
            runs[preset]()
        for _ in range(repeats):
            for preset, run in runs.items():
                begin = time.perf_counter()
                chunk = run()
                times[preset].append(1e3 * (time.perf_counter() - begin))
                steps = trial.steps - chunk.steps_skipped()
                done[preset] = {"context_latents": trial.read(chunk), "steps": steps}
    ms = {preset: statistics.median(found) for preset, found in times.items()}
    return {
        "family": family.name,
        "grid": [trial.history + trial.new, *trial.latent_grid],
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "presets": {
            preset: {"ms": ms[preset], "speed": ms["off"] / ms[preset], **done[preset]}
            for preset in PRESETS
        },
    }


class Trial:
    """One chunk of a family, what it is given, and the loop over its steps.

    Args:
        family: its widths, and what a chunk reads.
        latent_grid: tokens of one latent.
        dtype: of latents.
        device: of latents; cameras stay on the host.
        layers: blocks of a stack, each with keys of its own; None is one block by itself.
    """

    def __init__(
        self,
        family: Family,
        latent_grid: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | None = None,
        layers: int | None = None,
    ) -> None:
        self.family, self.latent_grid = family, latent_grid
        self.new = min(family.chunk_latents, _NEW)
        self.history = min(family.reads_latents, _HISTORY) // 2 * 2
        self.steps = min(family.steps, _STEPS if self.history else _STEPS_OF_A_CLIP)
        draw = functools.partial(torch.randn, dtype=dtype, device=device)
        self._old = draw(1, family.width, self.history, *latent_grid)
        self._noise = draw(1, family.width, self.new, *latent_grid)
        self._text = draw(1, family.text_tokens, family.width)
        tokens = latent_grid[0] * latent_grid[1]
        self._rays = draw(1, (self.history + self.new) * tokens, family.width)
        kept = (family.streams, family.heads, self.history * tokens, family.head_dim)
        held = draw(kept), draw(kept)
        self._kept = held if layers is None else [held] * layers
        self._cut: dict[int, Tensor] = {}
        self._asked: dict[str, Tensor | None] = {"latents": torch.empty(0, 1)}
        if self.history:
            features = torch.randn(self.history, 16)
            away_and_back = there_and_back(3, self.history // 2)
            back = away_and_back[torch.arange(self.new) % (self.history // 2)]
            cameras = {"poses": away_and_back[: self.history], "query": back}
            self._asked = {"latents": features}
            if family.history != "cached":
                self._asked |= cameras

    def read(self, chunk: Chunk) -> int:
        """Return how many latents of the history a chunk reads."""
        return len(chunk.context) if self.history else 0

    def chunk(self, block: Callable[..., Any], options: dict[str, Any]) -> Chunk:
        """Make one chunk."""
        family = self.family
        with lipass.Session(**options) as session, session.chunk(**self._asked) as chunk:
            context = list(chunk.context) if self.history else []
            x, past, front = self._noise, None, self._old[:, :, :0]
            if context and family.history == "encoded":
                front = self._old[:, :, context]
                past = block(front, x.new_zeros(1), self._text, self._of(front), None, True)
                front = front[:, :, :0]
            elif context and family.history == "cached":
                past = self._kept
            elif context:
                front = self._old[:, :, context]
            for step in chunk.steps(torch.linspace(1, 0, self.steps + 1)):
                joined = torch.cat([front, x], 2) if front.shape[2] else x
                level = x.new_full((1,), step.sigma)
                made = block(joined, level, self._text, self._of(joined), past)
                x = x + (step.sigma_next - step.sigma) * made[:, :, front.shape[2] :]
            session.effect.told = True  # one chunk is not what a session is judged by
        return chunk

    def _of(self, latents: Tensor) -> Tensor:
        """Return the rays of so many latents, the same object in each step."""
        tokens = latents[0, 0].numel()
        return self._cut.setdefault(tokens, self._rays[:, :tokens])
