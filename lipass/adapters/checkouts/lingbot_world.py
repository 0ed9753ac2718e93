"""Build a small LingBot-World from a checkout, and generate clips as its pipeline does."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from lipass.adapters.checkouts.imports import imported_from, without_its_imports
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.subject import Ran, Subject
from lipass.adapters.stand_ins import stand_in
from lipass.policy.convention import inverted
from lipass.receipt import ChunkRecord
from lipass.session import Session

CLIP, STEPS = 4, 4
OPTIONS = {"chunk_latents": CLIP, "context": False, "sparse.tile": (1, 2, 4)}
_CHANNELS, _HEIGHT, _WIDTH, _STRIDE = 16, 8, 16, 8
_STATES, _PROMPT, _GUIDANCE = 24, 16, 5.0
_FRAMES = 4 * (CLIP - 1) + 1


def build(checkout: Path, layers: int = 2) -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights."""
    needed = ("diffusers", "einops", "scipy", "tqdm")
    with (
        imported_from(checkout, needed, "wan/image2video.py") as stubbed,
        # a helper asks for the number of the GPU when it is imported
        patch("torch.cuda.current_device", lambda: 0),
    ):
        without_its_imports("wan", checkout)
        module = import_module("wan.image2video")
        models = import_module("wan.modules.model")
    # It asserts a GPU, and the library that it calls has no other kernels.
    models.flash_attention = stand_in(models.flash_attention)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = _small(models.WanModel, layers)
    pipeline = _pipeline(module, model)
    return Subject(
        family="lingbot_world",
        model=model,
        rollout=functools.partial(rollout, module),
        seen=_seen,
        expected=_expected,
        options=OPTIONS,
        pipeline=pipeline,
        drive=functools.partial(own_rollout, pipeline),
        stubbed=tuple(stubbed),
        leaves_out=frozenset({"steps", "blocks"}),
    )


def rollout(
    module: Any, model: Callable[..., Any], session: Session | None, chunks: int
) -> Iterator[Tensor]:
    """Yield the latents of each clip: a user's own loop, with the calls of the pipeline."""
    w2c = there_and_back(chunks, CLIP)
    for index in range(chunks):
        scheduler = module.FlowUniPCMultistepScheduler(
            num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
        )
        scheduler.set_timesteps(STEPS, device="cpu", shift=5.0)
        rays = _rays(module, inverted(w2c[index * CLIP : (index + 1) * CLIP]))
        named = {"seq_len": CLIP * _HEIGHT * _WIDTH // 4, "y": [_first_frame()]}
        named["dit_cond_dict"] = {"c2ws_plucker_emb": rays.chunk(1)}
        call = functools.partial(_guided, model, named)
        if session is None:
            yield _denoise(call, scheduler, index, scheduler.timesteps)
            continue
        done, end = index * CLIP, (index + 1) * CLIP
        with session.chunk(poses=w2c[:done] if done else None, query=w2c[done:end]) as chunk:
            steps = (step.timestep for step in chunk.steps(scheduler))
            made = _denoise(call, scheduler, index, steps)
        yield made


def _denoise(call: Callable[..., Tensor], scheduler: Any, seed: int, levels: Any) -> Tensor:
    x = _noise(torch.Generator().manual_seed(seed))
    for level in levels:
        x = scheduler.step(call(x, level)[None], level, x[None], return_dict=False)[0][0]
    return x[None]


def _guided(model: Callable[..., Any], named: dict[str, Any], x: Tensor, level: Tensor) -> Tensor:
    told, not_told = (
        model([x], t=torch.stack([level]), context=[prompt], **named)[0] for prompt in _prompts()
    )
    guided: Tensor = not_told + _GUIDANCE * (told - not_told)
    return guided


def own_rollout(pipeline: Any, chunks: int) -> Iterator[Tensor]:
    """Call what makes a clip in the release, once a clip, with the cameras as it reads them."""
    c2w = inverted(there_and_back(chunks, CLIP)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "intrinsics.npy", np.array([[300.0, 300.0, 416.0, 240.0]]))
        for index in range(chunks):
            latents = c2w[index * CLIP : (index + 1) * CLIP]
            frames = np.repeat(latents, 4, 0)[: _FRAMES + 3]
            np.save(Path(folder) / "poses.npy", frames[:_FRAMES])
            yield pipeline.generate(
                "a prompt",
                torch.zeros(3, _HEIGHT * _STRIDE, _WIDTH * _STRIDE),
                action_path=folder,
                max_area=_HEIGHT * _WIDTH * _STRIDE**2,
                frame_num=_FRAMES,
                sampling_steps=STEPS,
                guide_scale=_GUIDANCE,
                n_prompt="nothing",
                seed=index,
                offload_model=False,
            )


def _rays(module: Any, c2w: Tensor) -> Tensor:
    """Return what each place of each latent sees, `[1, 6 * 64, T, Y, X]`."""
    height, width = _HEIGHT * _STRIDE, _WIDTH * _STRIDE
    relative = module.compute_relative_poses(c2w, framewise=True)
    lens = torch.tensor([[300.0, 300.0, 416.0, 240.0]])
    sizes = {
        "height_org": 480, "width_org": 832, "height_resize": height, "width_resize": width,
        "height_final": height, "width_final": width,
    }  # fmt: skip
    lens = module.get_Ks_transformed(lens, **sizes).repeat(len(c2w), 1)
    rays: Tensor = module.get_plucker_embeddings(relative, lens, height, width)
    rays = rays.unflatten(1, (_HEIGHT, _STRIDE)).unflatten(3, (_WIDTH, _STRIDE))
    return rays.permute(5, 2, 4, 0, 1, 3).flatten(0, 2)[None]


def _first_frame() -> Tensor:
    """Return the latents that the first frame and nothing behind it make, with their mask."""
    shown = torch.zeros(4, CLIP, _HEIGHT, _WIDTH)
    shown[:, 0] = 1
    return torch.cat([shown, _noise(torch.Generator().manual_seed(99))])


def _noise(draw: torch.Generator) -> Tensor:
    return torch.randn(_CHANNELS, CLIP, _HEIGHT, _WIDTH, generator=draw)


@functools.cache
def _prompts() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(7, _STATES, generator=draw), torch.randn(5, _STATES, generator=draw)


def _pipeline(module: Any, model: nn.Module) -> Any:
    """Make a pipeline of a transformer alone, for all levels; the constructor wants weights."""
    module.TF = SimpleNamespace(to_tensor=torch.clone)
    pipeline = object.__new__(module.WanI2V)
    told, not_told = _prompts()
    codec = SimpleNamespace(encode=lambda _: [_first_frame()[4:]], decode=lambda x: [x[0][None]])
    vars(pipeline).update(
        device=torch.device("cpu"), rank=0, t5_cpu=True, init_on_cpu=False, sp_size=1,
        num_train_timesteps=1000, boundary=0.9, param_dtype=torch.float32,
        vae_stride=(4, _STRIDE, _STRIDE), patch_size=(1, 2, 2), sample_neg_prompt="",
        text_encoder=lambda texts, _: [told if texts == ["a prompt"] else not_told], vae=codec,
        low_noise_model=model, high_noise_model=model,
    )  # fmt: skip
    return pipeline


def _small(kind: Callable[..., nn.Module], layers: int) -> nn.Module:
    model = kind(
        model_type="i2v", patch_size=(1, 2, 2), text_len=_PROMPT, in_dim=2 * _CHANNELS + 4, dim=48,
        ffn_dim=96, freq_dim=32, text_dim=_STATES, out_dim=_CHANNELS, num_heads=2,
        num_layers=layers,
    )  # fmt: skip
    for parameter in model.parameters():  # some start at zero and would hide a wrong gate
        nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.1)
    return model.eval().requires_grad_(False)


def _seen(operator: str, shapes: Sequence[Sequence[int]]) -> int | None:
    """Read the latents of a call from its patch embedding, `[B, C, T, Y, X]`."""
    return shapes[0][2] if operator == "aten::conv3d" else None


def _expected(record: ChunkRecord) -> Ran:
    """Say what a clip runs: each step that is not answered, with the prompt and without."""
    assert record.plan.steps is not None
    calls = 2 * (record.plan.steps.total - record.steps_skipped)
    return Ran(calls, calls * CLIP)
