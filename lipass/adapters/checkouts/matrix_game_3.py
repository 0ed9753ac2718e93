"""Build a small random Matrix-Game-3.0 from a checkout, and roll it out clip by clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipass.adapters.checkouts.imports import imported_from
from lipass.adapters.checkouts.matrix_game_3_rollout import released
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.subject import Ran, Subject
from lipass.adapters.matrix_game_3 import FAMILY
from lipass.adapters.matrix_game_3_rollout import PAST_LATENTS
from lipass.adapters.stand_ins import stand_in
from lipass.receipt import ChunkRecord
from lipass.session import Session

_CHANNELS, _HEIGHT, _WIDTH, _RAYS = 48, 8, 12, 6 * 256
_FIRST, _NEW, _STEPS, _FRAMES = 15, 10, 3, 4
_DIM, _HEADS, _TEXT = 48, 2, 24


def build(checkout: Path, layers: int = 2) -> Subject:
    """Build the transformer of a checkout, few layers of it, on the CPU."""
    if not torch.cuda.is_available():
        # Tables of positions are asked for there, some while the code is imported.
        torch.cuda.current_device = _cpu  # type: ignore[assignment]
    root = checkout / "Matrix-Game-3"
    needed = ("einops", "scipy")
    with imported_from(root if root.is_dir() else checkout, needed) as stubbed:
        models = import_module("wan.modules.model")
        scheduler = import_module("wan.utils.fm_solvers_unipc").FlowUniPCMultistepScheduler
        rollouts = import_module("pipeline.inference_pipeline")
    # It asserts a GPU, and the library that it calls has no other kernels.
    models.flash_attention = stand_in(models.flash_attention)  # type: ignore[attr-defined]
    model = drawn(_configured(models.WanModel, layers))
    latent = (_CHANNELS, _HEIGHT, _WIDTH)
    pipeline, drive = released(rollouts, model, latent, _STEPS, _TEXT)
    return replace(
        subject(model, scheduler, tuple(stubbed)),
        pipeline=pipeline,
        drive=drive,
        drives_alike=False,
    )


def _cpu() -> str:
    return "cpu"


def _configured(model: Any, layers: int) -> nn.Module:
    actions = {
        "mouse_dim_in": 2, "keyboard_dim_in": 6, "hidden_size": 8, "img_hidden_size": _DIM,
        "keyboard_hidden_dim": _DIM, "mouse_hidden_dim": _DIM, "vae_time_compression_ratio": 4,
        "windows_size": 3, "heads_num": _HEADS, "patch_size": [1, 2, 2], "qk_norm": True,
        "qkv_bias": False, "rope_dim_list": [8, 8, 8], "mouse_qk_dim_list": [8, 8, 8],
        "rope_theta": 256, "enable_mouse": True, "enable_keyboard": True, "blocks": [0],
    }  # fmt: skip
    made: nn.Module = model(
        model_type="ti2v", patch_size=(1, 2, 2), text_len=16, in_dim=_CHANNELS, dim=_DIM,
        ffn_dim=2 * _DIM, freq_dim=32, text_dim=_TEXT, out_dim=_CHANNELS, num_heads=_HEADS,
        num_layers=layers, action_config=actions, use_memory=True,
    )  # fmt: skip
    return made


def drawn(model: nn.Module) -> nn.Module:
    """Draw all weights, those that start at zero too, and let products take fp32 on a CPU.

    The release runs them in an autocast for CUDA and casts what cross-attention reads to bf16.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(_as_its_weight)
    return model.eval()


def _as_its_weight(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return (args[0].to(weight.dtype),)


def subject(
    model: nn.Module, scheduler: Callable[[], Any], stubbed: tuple[str, ...] = ()
) -> Subject:
    """Say how a model with the call structure of Matrix-Game-3.0 is rolled out and counted."""
    return Subject(
        family=FAMILY.name,
        model=model,
        rollout=_Rollout(scheduler),
        seen=_seen,
        expected=_expected,
        options={
            "chunk_latents": _NEW,
            "context.window_latents": PAST_LATENTS,
            "sparse.tile": (2, 2, 2),
        },
        stubbed=stubbed,
    )


class _Rollout:
    """The loop of the release over clips and steps, cameras, actions and rays drawn at random."""

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._scheduler = scheduler

    def __call__(
        self, model: Callable[..., Any], session: Session | None, chunks: int
    ) -> Iterator[Tensor]:
        """Yield the new latents of each clip."""
        total = _FIRST + _NEW * (chunks - 1)
        # clips of ten, so that the first, which is longer, looks as the second begins to
        w2c = there_and_back(chunks + 1, _NEW)
        w2c = torch.cat([w2c[:1].expand(_FIRST - _NEW, 4, 4), w2c])[:total]
        given = _Given(total)
        latents = given.noise[:, :, :0]
        for clip in range(chunks):
            done = latents.shape[2]
            new = _NEW if clip else _FIRST
            query = w2c[done : done + new]
            # five of memory, as the release has always
            own = [1, 3, 5, 7, 9, *range(done - PAST_LATENTS, done)] if done else []
            if session is None:
                made = self._clip(model, given, latents, own, new, None)
            else:
                poses = w2c[:done] if done else None
                with session.chunk(poses=poses, query=query, own_context=own) as chunk:
                    made = self._clip(model, given, latents, chunk.context, new, chunk)
            latents = torch.cat([latents, made], 2)
            yield made.clone()

    def _clip(
        self,
        model: Callable[..., Any],
        given: _Given,
        latents: Tensor,
        context: Sequence[int],
        new: int,
        chunk: Any,
    ) -> Tensor:
        done = latents.shape[2]
        past = min(PAST_LATENTS, done)
        memory = [index for index in context if index < done - past]
        scheduler = self._scheduler()
        scheduler.set_timesteps(_STEPS, device="cpu", shift=5.0)
        clean = latents[:, :, done - past :]
        x = torch.cat([clean, given.noise[:, :, done : done + new]], 2)
        named = given.arguments(latents, memory, done - past, done + new)
        steps = scheduler.timesteps if chunk is None else chunk.steps(scheduler)
        for step in steps:
            level = step if chunk is None else step.timestep
            t = torch.full((past + new, _HEIGHT * _WIDTH // 4), float(level))
            t[:past] = 0
            velocity = model(x=x, t=t.flatten()[None], **named)
            x = scheduler.step(velocity, level, x, return_dict=False)[0]
            x = torch.cat([clean, x[:, :, past:]], 2)
        return x[:, :, past:]


class _Given:
    """What a rollout is given in front: noise, rays and actions of each latent, a prompt."""

    def __init__(self, latents: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.noise = draw(1, _CHANNELS, latents, _HEIGHT, _WIDTH)
        self._rays = draw(1, _RAYS, latents, _HEIGHT, _WIDTH) * 0.1
        self._mouse, self._keys = draw(1, 1 + 4 * latents, 2), draw(1, 1 + 4 * latents, 6)
        self._prompt = [draw(7, _TEXT)]

    def arguments(
        self, latents: Tensor, memory: list[int], begin: int, end: int
    ) -> dict[str, Any]:
        """Return what the model is called with beside the noisy latents and their level."""
        frames = slice(0, 57) if begin == 0 else slice(1 + 4 * (begin - 1), 1 + 4 * (end - 1))
        places = _HEIGHT * _WIDTH // 4
        named: dict[str, Any] = {
            "context": self._prompt,
            "seq_len": (_FIRST + 5) * places,
            "mouse_cond": self._mouse[:, frames],
            "keyboard_cond": self._keys[:, frames],
            "plucker_emb": self._rays[:, :, [*memory, *range(begin, end)]],
            "predict_latent_idx": (begin, end),
        }
        if memory:
            named |= {
                "x_memory": latents[:, :, memory],
                "timestep_memory": torch.zeros(1, len(memory) * places),
                "mouse_cond_memory": torch.ones(1, len(memory), 2),
                "keyboard_cond_memory": -torch.ones(1, len(memory), 6),
                "memory_latent_idx": memory,
            }
        return named


def _seen(operator: str, shapes: Sequence[Sequence[int]]) -> int | None:
    """Count the latents that the patches of a call are embedded from."""
    if operator != "aten::conv3d" or not shapes or len(shapes[0]) != 5:
        return None
    return shapes[0][2]


def _expected(record: ChunkRecord) -> Ran:
    plan = record.plan
    calls = _STEPS - record.steps_skipped
    each = _NEW + len(plan.context.indices) if plan.history_latents else _FIRST
    return Ran(calls, calls * each)
