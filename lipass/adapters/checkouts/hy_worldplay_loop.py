"""Roll a small HY-WorldPlay out: by a loop of a user's own, and by that of its pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lipass.adapters.checkouts.poses import there_and_back
from lipass.session import Session

CHUNK, STEPS = 4, 4
RECENT, CONTEXT = 12, 20
# The release has 30 x 52 tokens a latent frame and 32 channels.
LATENT, STATES = (8, 8, 8), 32
_CONTEXT_LEVEL, _PROMPT = 14.0, 6


class Loop:
    """A user's own loop: the calls that the pipeline makes, without what is around them."""

    def __init__(self, scheduler: Callable[[], Any], pipeline: Any) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline

    def __call__(
        self, model: Callable[..., Any], session: Session | None, chunks: int
    ) -> Iterator[Tensor]:
        """Yield the latents of each chunk, `[1, C, T, Y, X]`."""
        given = Given(chunks)
        text = model(**_TEXT, **given.prompt())
        for index in range(chunks):
            start, end = index * CHUNK, (index + 1) * CHUNK
            if session is None:
                context = self._own_context(given, start)
                self._denoise(model, given, text, context, start, self._pairs())
            else:
                with session.chunk(
                    poses=given.w2c[0, :start] if start else None,
                    query=given.w2c[0, start:end],
                    latents=given.latents[0, :, :start].transpose(0, 1),
                ) as chunk:
                    steps = chunk.steps(self._sigmas())
                    levels = ((step.sigma, step.sigma_next) for step in steps)
                    self._denoise(model, given, text, chunk.context, start, levels)
            yield given.latents[:, :, start:end].clone()

    def _sigmas(self) -> list[float]:
        scheduler = self._scheduler()
        scheduler.set_timesteps(STEPS)
        return scheduler.sigmas.tolist()

    def _pairs(self) -> Iterator[tuple[float, float]]:
        return itertools.pairwise(self._sigmas())

    def _own_context(self, given: Given, start: int) -> list[int]:
        if start == 0:
            return []
        return retrieved(self._pipeline, given.w2c[0], start, given.points)

    def _denoise(
        self,
        model: Callable[..., Any],
        given: Given,
        text: list[dict[str, Any]],
        context: list[int],
        start: int,
        levels: Any,
    ) -> None:
        cache, own = text, list(range(start, start + CHUNK))
        if context:
            level = torch.full((len(context),), _CONTEXT_LEVEL)
            cache = model(
                **_VISION,
                **given.call(context),
                timestep=level,
                kv_cache=text,
                cache_vision=True,
                rope_temporal_size=len(context),
                start_rope_start_idx=0,
            )
        for sigma, following in levels:
            velocity = model(
                **_VISION,
                **given.call(own),
                timestep=torch.full((CHUNK,), 1000.0 * sigma),
                kv_cache=cache,
                cache_vision=False,
                rope_temporal_size=len(context) + CHUNK,
                start_rope_start_idx=len(context),
            )[0]
            given.latents[:, :, start : start + CHUNK] += (following - sigma) * velocity


_TEXT = {"bi_inference": False, "ar_txt_inference": True, "cache_txt": True}
_VISION = {"bi_inference": False, "ar_vision_inference": True}


class Given:
    """What a rollout is given, the same each time: noise, prompt, cameras, actions."""

    def __init__(self, chunks: int) -> None:
        draw = torch.Generator().manual_seed(7)
        channels, height, width = LATENT
        self._prompt = torch.randn(1, _PROMPT, STATES, generator=draw)
        # Drawn chunk by chunk, so that more chunks begin as fewer do.
        drawn = [
            torch.randn(2 * channels + 1, CHUNK, height, width, generator=draw)
            for _ in range(chunks)
        ]
        self.latents, self.condition = (
            torch.cat(drawn, 1)[None].split([channels, channels + 1], dim=1)
        )  # fmt: skip
        self.latents = self.latents.clone()
        self.w2c = there_and_back(chunks, CHUNK)[None]
        self.intrinsics = torch.tensor([[0.9, 0.0, 0.5], [0.0, 1.6, 0.5], [0.0, 0.0, 1.0]])
        self.actions = torch.arange(chunks * CHUNK)[None].remainder(9).float()
        direction = torch.randn(2000, 3, generator=draw)
        distance = 8.0 * torch.rand(2000, 1, generator=draw) ** (1 / 3)
        self.points = direction / direction.norm(dim=1, keepdim=True) * distance

    def prompt(self) -> dict[str, Any]:
        """Return the arguments of the text call; the last two tokens are padding."""
        mask = (torch.arange(_PROMPT) < _PROMPT - 2).long()[None]
        return {
            "timestep_txt": torch.zeros(1),
            "text_states": self._prompt,
            "encoder_attention_mask": mask,
            "mask_type": "i2v",
            "extra_kwargs": {},
            "kv_cache": None,
        }

    def call(self, frames: list[int]) -> dict[str, Any]:
        """Return what a call gets of some latent frames."""
        return {
            "hidden_states": torch.cat(
                [self.latents[:, :, frames], self.condition[:, :, frames]], 1
            ),
            "viewmats": self.w2c[:, frames],
            "Ks": self.intrinsics.repeat(1, len(frames), 1, 1),
            "action": self.actions[:, frames],
        }


def own_rollout(pipeline: Any, chunks: int) -> list[Tensor]:
    """Run the rollout of the release, without what encodes in front and decodes behind."""
    given = Given(chunks)
    pipeline.chunk_num = chunks * CHUNK // pipeline.chunk_latent_frames
    pipeline.points_local = given.points
    pipeline.scheduler.set_timesteps(STEPS)
    text = given.prompt()
    latents = pipeline.ar_rollout(
        latents=given.latents,
        timesteps=pipeline.scheduler.timesteps,
        prompt_embeds=text["text_states"],
        prompt_mask=text["encoder_attention_mask"],
        vision_states=torch.zeros(1, 1, 1),
        cond_latents=given.condition,
        task_type=text["mask_type"],
        extra_kwargs={"byt5_text_states": torch.zeros(1, 1), "byt5_text_mask": torch.zeros(1, 1)},
        viewmats=given.w2c,
        Ks=given.intrinsics.repeat(1, chunks * CHUNK, 1, 1),
        action=given.actions,
        device=torch.device("cpu"),
    )
    return list(latents.split(CHUNK, dim=2))


def retrieved(pipeline: Any, w2c: Tensor, start: int, points: Tensor) -> list[int]:
    """Ask the checkout for the context of the chunk that starts at a latent."""
    chosen: list[int] = pipeline.select_aligned_memory_frames(
        w2c.numpy(),
        start,
        memory_frames=CONTEXT,
        temporal_context_size=RECENT,
        pred_latent_size=CHUNK,
        points_local=points,
        device="cpu",
    )
    return chosen
