"""Roll a small Self-Forcing out: a loop as a user writes it, and that of the release."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from lipass.adapters.checkouts.poses import there_and_back
from lipass.session import Session

CHUNK = 3
# The release has 30 x 52 tokens a latent frame, 16 channels, and a prompt of 512 tokens.
LATENT, TOKENS, PROMPT, STATES = (4, 8, 16), 4 * 8, 16, 48
ROOM = 24


class Loop:
    """A user's own loop: the calls that the pipeline makes, without what is around them."""

    def __init__(self, pipeline: Any, has_cameras: bool = False) -> None:
        self._pipeline, self._has_cameras = pipeline, has_cameras
        self._own = {place: vars(module)[name] for place, module, name in _attention_names()}

    def __call__(
        self, model: Callable[..., Any], session: Session | None, chunks: int
    ) -> Iterator[Tensor]:
        """Yield the latents of each block, `[1, C, T, Y, X]`."""
        given = Given(chunks)
        torch.manual_seed(7)
        caches, done = self._caches(), given.noise[:, :0]
        sigmas = [float(level) / 1000 for level in self._pipeline.denoising_step_list] + [0.0]
        for index in range(chunks):
            start, end = index * CHUNK, (index + 1) * CHUNK
            call = functools.partial(self._call, model, given, caches, start)
            with self._runs_without_a_gpu():
                if session is None:
                    x = self._denoise(call, given.noise[:, start:end], sigmas, range(4))
                    call(x, 0.0)
                else:
                    with session.chunk(
                        poses=given.w2c[:start] if start else None,
                        query=given.w2c[start:end],
                        latents=done[0] if start else None,
                    ) as chunk:
                        steps = (step.index for step in chunk.steps(sigmas))
                        total = [step.index for step in chunk.step_plan(4).sequence()]
                        levels = [sigmas[i] for i in (*total, 4)]
                        x = self._denoise(call, given.noise[:, start:end], levels, steps)
                        call(x, 0.0)
            done = torch.cat([done, x], 1)
            yield x.transpose(1, 2).clone()

    def _denoise(
        self, call: Callable[..., Tensor], x: Tensor, levels: list[float], steps: Any
    ) -> Tensor:
        """Predict clean latents at each level, and add noise of the next one that is computed."""
        for place, _ in enumerate(steps):
            x, following = call(x, levels[place]), levels[place + 1]
            if following:
                flat = x.flatten(0, 1)
                level = torch.full((len(flat),), 1000 * following)
                noised = self._pipeline.scheduler.add_noise(flat, torch.randn_like(flat), level)
                x = noised.unflatten(0, x.shape[:2])
        return x

    def _call(
        self,
        model: Callable[..., Any],
        given: Given,
        caches: dict[str, Any],
        start: int,
        x: Tensor,
        sigma: float,
    ) -> Tensor:
        level = torch.full(x.shape[:2], 1000 * sigma)
        end = start + x.shape[1]
        seen = {name: one[:, start:end] for name, one in self._cameras(given).items()}
        velocity = model(
            x.transpose(1, 2),
            t=level,
            context=given.prompt,
            seq_len=ROOM * TOKENS,
            **caches,
            **seen,
            current_start=start * TOKENS,
            cache_start=None,
        ).transpose(1, 2)
        clean: Tensor = self._pipeline.generator._convert_flow_pred_to_x0(
            velocity.flatten(0, 1), x.flatten(0, 1), level.flatten()
        )
        return clean.unflatten(0, x.shape[:2])

    def _cameras(self, given: Given) -> dict[str, Tensor]:
        return cameras_of(given) if self._has_cameras else {}

    def _caches(self) -> dict[str, Any]:
        kv_cache, crossattn_cache = new_caches(self._pipeline.generator.model)
        caches: dict[str, Any] = {"kv_cache": kv_cache, "crossattn_cache": crossattn_cache}
        if self._has_cameras:
            caches["prope_kv_cache"], _ = new_caches(self._pipeline.generator.model)
        return caches

    @contextlib.contextmanager
    def _runs_without_a_gpu(self) -> Iterator[None]:
        """Bind plain attention where the checkout's own, which asks for a GPU, still stands."""
        with contextlib.ExitStack() as bound:
            for place, module, name in _attention_names():
                if vars(module)[name] is self._own[place]:
                    bound.enter_context(patch.object(module, name, _plain))
            yield


class Given:
    """What a rollout is given, the same each time: noise, prompt, cameras."""

    def __init__(self, chunks: int) -> None:
        draw = torch.Generator().manual_seed(7)
        self.prompt = torch.randn(1, PROMPT, STATES, generator=draw)
        # Drawn chunk by chunk, so that more chunks begin as fewer do.
        noise = [torch.randn(1, CHUNK, *LATENT, generator=draw) for _ in range(chunks)]
        self.noise = torch.cat(noise, 1)
        self.w2c = there_and_back(chunks, CHUNK)


def cameras_of(given: Given) -> dict[str, Tensor]:
    """Return what a transformer with cameras takes of all latents: `[1, N, 4, 4]` and lenses."""
    lens = torch.tensor([[0.9, 0.0, 0.5], [0.0, 1.2, 0.5], [0.0, 0.0, 1.0]])
    return {"viewmats": given.w2c[None], "Ks": lens.repeat(1, len(given.w2c), 1, 1)}


def own_rollout(pipeline: Any, chunks: int, *, has_cameras: bool = False) -> list[Tensor]:
    """Run the rollout of the release, which has to be driven, as it is given cameras."""
    given = Given(chunks)
    torch.manual_seed(7)
    pipeline.kv_cache1, pipeline.crossattn_cache = new_caches(pipeline.generator.model)
    if has_cameras:
        pipeline.prope_kv_cache1, _ = new_caches(pipeline.generator.model)
    cameras = cameras_of(given) if has_cameras else {"poses": given.w2c}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        # it waits for the GPU when it takes the time
        patch("torch.cuda.synchronize", lambda: None),
    ):
        _, latents = pipeline.inference(given.noise, ["a prompt"], return_latents=True, **cameras)
    return list(latents.transpose(1, 2).split(CHUNK, dim=2))


def new_caches(model: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make the caches that the pipeline makes, at the sizes of this model."""
    heads = (model.num_heads, model.dim // model.num_heads)
    own, prompt = (
        [{name: torch.zeros(1, tokens, *heads) for name in "kv"} for _ in model.blocks]
        for tokens in (ROOM * TOKENS, PROMPT)
    )
    ends = ("global_end_index", "local_end_index")
    kv_cache = [one | {name: torch.tensor([0]) for name in ends} for one in own]
    return kv_cache, [one | {"is_init": False} for one in prompt]


def _attention_names() -> Iterator[tuple[int, Any, str]]:
    """Yield where the transformer's files bind attention by name."""
    places = [("causal_model", "attention"), ("model", "flash_attention")]
    for place, (file, name) in enumerate(places):
        yield place, sys.modules[f"wan.modules.{file}"], name


def _plain(q: Tensor, k: Tensor, v: Tensor, k_lens: Any = None, **given: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
