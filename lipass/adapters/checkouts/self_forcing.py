"""Build a small Self-Forcing from a checkout, and roll it out as its pipeline does."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipass.adapters.checkouts.imports import imported_from, without_its_imports
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.subject import Ran, Subject
from lipass.receipt import ChunkRecord
from lipass.session import Session

CHUNK = 3
OPTIONS = {
    "chunk_latents": CHUNK,
    "context.window_chunks_max": 1,
    "context.window_chunks_min": 1,
    "sparse.dense_tokens": 0,
    "sparse.dense_chunks": 0,
    "sparse.tile": (1, 4, 4),
}
_LEVELS = [1000, 750, 500, 250]
# The release has 30 x 52 tokens a latent frame, 16 channels, and a prompt of 512 tokens.
_LATENT, _TOKENS, _PROMPT, _STATES = (4, 8, 16), 4 * 8, 16, 48
_ROOM = 24


def build(checkout: Path, layers: int = 2, family: str = "self_forcing") -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights."""
    with (
        imported_from(checkout, ("diffusers",), "wan/modules/causal_model.py") as stubbed,
        # a helper asks for the number of the GPU when it is imported
        patch("torch.cuda.current_device", lambda: 0),
    ):
        for name in ("wan", "pipeline"):
            without_its_imports(name, checkout)
        rollouts = import_module("pipeline.causal_inference")
        wrappers = import_module("utils.wan_wrapper")
        models = import_module("wan.modules.causal_model")
    torch.manual_seed(0)
    model = _small(models.CausalWanModel, layers)
    pipeline = _pipeline(rollouts.CausalInferencePipeline, wrappers, model)
    return Subject(
        family=family,
        model=model,
        rollout=Loop(pipeline),
        seen=latents_embedded,
        expected=expected,
        options=OPTIONS,
        pipeline=pipeline,
        drive=functools.partial(own_rollout, pipeline),
        stubbed=tuple(stubbed),
    )


def latents_embedded(operator: str, shapes: Sequence[Sequence[int]]) -> int | None:
    """Read the latents of a call from its patch embedding, `[B, C, T, Y, X]`."""
    return shapes[0][2] if operator == "aten::conv3d" else None


def expected(record: ChunkRecord) -> Ran:
    """Say what a block runs: each step that is not skipped, and the refresh of the cache."""
    assert record.plan.steps is not None
    calls = record.plan.steps.total - record.steps_skipped + 1
    return Ran(calls, calls * CHUNK)


class Loop:
    """A user's own loop: the calls that the pipeline makes, without what is around them."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
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
        velocity = model(
            x.transpose(1, 2),
            t=level,
            context=given.prompt,
            seq_len=_ROOM * _TOKENS,
            **caches,
            current_start=start * _TOKENS,
            cache_start=None,
        ).transpose(1, 2)
        clean: Tensor = self._pipeline.generator._convert_flow_pred_to_x0(
            velocity.flatten(0, 1), x.flatten(0, 1), level.flatten()
        )
        return clean.unflatten(0, x.shape[:2])

    def _caches(self) -> dict[str, Any]:
        kv_cache, crossattn_cache = new_caches(self._pipeline.generator.model)
        return {"kv_cache": kv_cache, "crossattn_cache": crossattn_cache}

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
        self.prompt = torch.randn(1, _PROMPT, _STATES, generator=draw)
        # Drawn chunk by chunk, so that more chunks begin as fewer do.
        noise = [torch.randn(1, CHUNK, *_LATENT, generator=draw) for _ in range(chunks)]
        self.noise = torch.cat(noise, 1)
        self.w2c = there_and_back(chunks, CHUNK)


def own_rollout(pipeline: Any, chunks: int) -> list[Tensor]:
    """Run the rollout of the release, which has to be driven, as it is given cameras."""
    given = Given(chunks)
    torch.manual_seed(7)
    pipeline.kv_cache1, pipeline.crossattn_cache = new_caches(pipeline.generator.model)
    with contextlib.redirect_stdout(io.StringIO()):
        _, latents = pipeline.inference(
            given.noise, ["a prompt"], return_latents=True, poses=given.w2c
        )
    return list(latents.transpose(1, 2).split(CHUNK, dim=2))


def new_caches(model: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make the caches that the pipeline makes, at the sizes of this model."""
    heads = (model.num_heads, model.dim // model.num_heads)
    own, prompt = (
        [{name: torch.zeros(1, tokens, *heads) for name in "kv"} for _ in model.blocks]
        for tokens in (_ROOM * _TOKENS, _PROMPT)
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


class _Prompt(nn.Module):
    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": Given(1).prompt}


class _NoDecoder(nn.Module):
    def decode_to_pixel(self, latents: Tensor, use_cache: bool = False) -> Tensor:
        return latents


def _pipeline(kind: Any, wrappers: Any, model: nn.Module) -> Any:
    """Make a pipeline of a transformer alone; the constructors want weights."""
    generator = object.__new__(wrappers.WanDiffusionWrapper)
    nn.Module.__init__(generator)
    scheduler = wrappers.FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    scheduler.set_timesteps(1000, training=True)
    generator.model, generator.scheduler = model, scheduler
    generator.uniform_timestep, generator.seq_len = False, _ROOM * _TOKENS
    settings = SimpleNamespace(
        denoising_step_list=_LEVELS,
        warp_denoising_step=True,
        num_frame_per_block=CHUNK,
        independent_first_frame=False,
        context_noise=0,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        generator.post_init()
        pipeline = kind(settings, "cpu", generator, _Prompt(), _NoDecoder())
    pipeline.num_transformer_blocks = len(generator.model.blocks)
    pipeline.frame_seq_length = _TOKENS
    return pipeline


def _small(kind: Callable[..., nn.Module], layers: int) -> nn.Module:
    model = kind(
        in_dim=_LATENT[0],
        out_dim=_LATENT[0],
        dim=64,
        ffn_dim=96,
        freq_dim=32,
        text_dim=_STATES,
        text_len=_PROMPT,
        num_heads=2,
        num_layers=layers,
    )
    for parameter in model.parameters():  # some start at zero and would hide a wrong gate
        nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.1)
    return model.eval()
