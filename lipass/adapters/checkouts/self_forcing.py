"""Build a small Self-Forcing from a checkout."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lipass.adapters.checkouts.imports import imported_from, without_its_imports
from lipass.adapters.checkouts.self_forcing_loop import (
    CHUNK,
    LATENT,
    PROMPT,
    ROOM,
    STATES,
    TOKENS,
    Given,
    Loop,
    own_rollout,
)
from lipass.adapters.checkouts.subject import Ran, Subject
from lipass.receipt import ChunkRecord

OPTIONS = {
    "chunk_latents": CHUNK,
    "context.window_chunks_max": 1,
    "context.window_chunks_min": 1,
    "sparse.dense_tokens": 0,
    "sparse.dense_chunks": 0,
    "sparse.tile": (1, 4, 4),
}
_LEVELS = [1000, 750, 500, 250]


def build(
    checkout: Path,
    layers: int = 2,
    family: str = "self_forcing",
    *,
    helpers: str = "utils",
    has_cameras: bool = False,
) -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights.

    Args:
        checkout: its folder.
        layers: how many.
        family: whose checkout it is.
        helpers: the package that holds its wrappers.
        has_cameras: whether its transformer takes cameras, and a second cache for them.
    """
    with (
        imported_from(checkout, ("diffusers",), "wan/modules/causal_model.py") as stubbed,
        # a helper asks for the number of the GPU when it is imported
        patch("torch.cuda.current_device", lambda: 0),
    ):
        for name in ("wan", "pipeline"):
            without_its_imports(name, checkout)
        rollouts = import_module("pipeline.causal_inference")
        wrappers = import_module(f"{helpers}.wan_wrapper")
        models = import_module("wan.modules.causal_model")
    torch.manual_seed(0)
    model = _small(models.CausalWanModel, layers)
    if has_cameras:
        import_module("wan.modules.prope").add_prope_parameters(model)
    drawn(model)
    pipeline = _pipeline(rollouts.CausalInferencePipeline, wrappers, model)
    return Subject(
        family=family,
        model=model,
        rollout=Loop(pipeline, has_cameras),
        seen=latents_embedded,
        expected=expected,
        options=OPTIONS,
        pipeline=pipeline,
        drive=functools.partial(own_rollout, pipeline, has_cameras=has_cameras),
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
    generator.uniform_timestep, generator.seq_len = False, ROOM * TOKENS
    generator.use_camera = False  # what it would add is there
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
    pipeline.frame_seq_length = TOKENS
    return pipeline


def _small(kind: Callable[..., nn.Module], layers: int) -> nn.Module:
    model = kind(
        in_dim=LATENT[0],
        out_dim=LATENT[0],
        dim=64,
        ffn_dim=96,
        freq_dim=32,
        text_dim=STATES,
        text_len=PROMPT,
        num_heads=2,
        num_layers=layers,
    )
    return model.eval()


def drawn(model: nn.Module) -> None:
    """Draw all weights; some start at zero and would hide a wrong gate."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.1)
