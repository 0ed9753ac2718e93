"""Let the pipeline of a checkout of Matrix-Game-3.0 generate clips with a small transformer."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lipass.adapters.checkouts.poses import there_and_back
from lipass.policy.convention import inverted

_CODEC = 16
_FIRST_FRAMES, _NEW_FRAMES = 57, 40


def released(
    module: ModuleType, model: nn.Module, latent: tuple[int, int, int], steps: int, text: int
) -> tuple[Any, Callable[[int], list[Tensor]]]:
    """Return a pipeline without encoders and codec, and its rollout: `drive(clips)`.

    Args:
        module: that of the pipeline.
        model: its transformer, of fp32.
        latent: `(C, Y, X)`.
        steps: of denoising.
        text: width of the prompt.
    """
    made: list[Tensor] = []
    channels, height, width = latent
    draw = torch.Generator().manual_seed(2)
    image = torch.randn(1, channels, 1, height, width, generator=draw)
    prompt = [torch.randn(7, text, generator=draw)]

    def decode(latents: Tensor, cache: Any, **named: Any) -> tuple[Tensor, Any]:
        made.append(latents.clone())
        return torch.zeros(1, 3, 1, 1, 1), cache

    pipeline = object.__new__(vars(module)["MatrixGame3Pipeline"])
    vars(pipeline).update(
        model=model, device=torch.device("cpu"), rank=0, sp_size=1, fa_version=None,
        use_async_vae=False, output_dir="", vae_stride=(4, _CODEC, _CODEC), patch_size=(1, 2, 2),
        text_encoder=lambda texts, device: prompt, config=SimpleNamespace(sample_neg_prompt=""),
        vae=SimpleNamespace(
            encode=lambda frames: [image[0]], stream_decode=decode, dtype=torch.float32
        ),
    )  # fmt: skip

    def drive(clips: int) -> list[Tensor]:
        made.clear()
        args = SimpleNamespace(
            size=f"{height * _CODEC}*{width * _CODEC}", save_name="", num_iterations=clips
        )
        bound = {
            "torch": _in_fp32(),
            "get_data": functools.partial(_data, latent),
            "process_video": lambda *given, **named: None,
            "exit": lambda: None,
        }
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(contextlib.redirect_stdout(io.StringIO()))
            for name, value in bound.items():
                scopes.enter_context(patch.object(module, name, value, create=True))
            pipeline.generate(
                "a prompt",
                None,
                max_area=height * width * _CODEC**2,
                num_inference_steps=steps,
                seed=0,
                args=args,
            )
        return list(made)

    return pipeline, drive


def _in_fp32() -> ModuleType:
    """Return a copy of torch for a pipeline that casts all to bf16, as on a GPU."""
    copy = ModuleType("torch")
    vars(copy).update(vars(torch))
    vars(copy).update(bfloat16=torch.float32)
    return copy


def _data(
    latent: tuple[int, int, int], frames: int, height: int, width: int, *given: Any, **named: Any
) -> tuple[Tensor, ...]:
    """Return what a clip starts from: a first frame, cameras, keys and mouse of each frame."""
    draw = torch.Generator().manual_seed(3)
    keys, mouse = (torch.randn(1, frames, n, generator=draw) for n in (6, 2))
    image = torch.zeros(1, 3, 1, height, width)
    return image, cameras(frames), keys, mouse


def cameras(frames: int) -> Tensor:
    """Return camera-to-world matrices of video frames; each second clip looks the other way."""
    clips = 2 + (frames - _FIRST_FRAMES) // _NEW_FRAMES
    c2w = inverted(there_and_back(clips, _NEW_FRAMES))
    front = c2w[:1].expand(_FIRST_FRAMES - _NEW_FRAMES, 4, 4)
    return torch.cat([front, c2w])[:frames]
