"""Self-Forcing, Causal-Forcing and minWM: a rolled cache written in place, blocks re-noised."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from lipass.adapters.adoption import Adoption, place
from lipass.adapters.blockwise import Blocks, Cache, Levels
from lipass.adapters.cache_ends import CacheEnds, holds_indices, tie
from lipass.adapters.driving import cameras_of
from lipass.adapters.families import Family
from lipass.errors import LipassError
from lipass.session import Session

_CACHES = ("kv_cache", "prope_kv_cache")
_LEVELS = ("denoising_step_list", "denoising_step_list_first_chunk")
_OF_ITS_LOOP = (
    "generator",
    "kv_cache1",
    "num_frame_per_block",
    "frame_seq_length",
    "independent_first_frame",
)
_OF_ITS_ATTENTION = ("max_attention_size", "sink_size")


def _adopt(model: Any, adoption: Adoption) -> None:
    if _lacks(model.blocks[0].self_attn, _OF_ITS_ATTENTION):
        return  # of others, who write each sample's end in place
    ends = CacheEnds(adoption)
    why = "ends of its caches are ints, not tensors"
    # what reads a cache for the first time is outside of what `model.compile()` compiles
    kind, where = type(model), place(type(model).forward, model)
    adoption.rebind(kind, "__call__", _reading(kind.__call__, ends), why, where)
    adoption.rebind(model, "forward", MethodType(_tying(kind.forward), model), why)


def _reading(own: Callable[..., Any], ends: CacheEnds) -> Callable[..., Any]:
    @torch.compiler.disable(reason="a cache is seen for the first time")
    def read(caches: list[Any]) -> None:
        for layers in caches:
            ends.keep(layers)

    def __call__(self: Any, *args: Any, **given: Any) -> Any:
        caches = [given[name] for name in _CACHES if given.get(name) is not None]
        if any([holds_indices(layers) for layers in caches]):
            read(caches)
        return own(self, *args, **given)

    return __call__


def _tying(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        for name in _CACHES:
            if given.get(name) is not None:
                tie(given[name])
        return own(self, *args, **given)

    # torch counts recompilations by code object: those of one model are not those of the next
    code = forward.__code__.replace()
    return FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)


def _drive(pipeline: Any, session: Session, adoption: Adoption) -> None:
    """Let `pipeline.inference` ask a session, block by block.

    While it is driven it takes `poses`, `[N, 4, 4]` cameras of all latents in the session's
    convention, or the `viewmats` `[B, N, 4, 4]` of models that have them. Without cameras history
    is chosen by how fast latents change, and steps are reused with `steps.overlap_min` 0 only.

    Raises:
        LipassError: if the pipeline rolls a model of this class out in another way.
    """
    _refuse_other_loops(pipeline)
    generator: Any = pipeline.generator
    blocks = Blocks(
        session,
        cache=functools.partial(_cache, pipeline),
        new_latents=functools.partial(_new_latents, pipeline),
        sigma_of=functools.partial(_sigma_of, generator.scheduler),
    )
    own_forward, own_inference = generator.forward, pipeline.inference

    def forward(*args: Any, **given: Any) -> Any:
        out = own_forward(*args, **given)
        if not blocks.in_step and given.get("kv_cache") is not None:
            latents: Tensor = args[0] if args else given["noisy_image_or_video"]
            blocks.add(latents, given["current_start"] // pipeline.frame_seq_length)
        return out

    @functools.wraps(own_inference)
    def inference(*args: Any, poses: Tensor | None = None, **given: Any) -> Any:
        bound = inspect.signature(own_inference).bind_partial(*args, **given).arguments
        viewmats = bound.get("viewmats")
        if poses is None and viewmats is not None:
            poses = cameras_of(session, viewmats)
        blocks.restart(poses)
        try:
            out = own_inference(*args, **given)
        except BaseException as error:
            blocks.finish(error)
            raise
        blocks.finish()
        return out

    adoption.rebind(generator, "forward", forward, "clean latents are the history")
    adoption.rebind(pipeline, "inference", inference, "each block is a chunk of the session")
    for name in _LEVELS:
        levels = getattr(pipeline, name, None)
        if levels is not None:
            adoption.rebind(pipeline, name, Levels(levels, blocks), "levels that compute")


def _refuse_other_loops(pipeline: Any) -> None:
    """Refuse pipelines of others whose transformers have the file and class name of these.

    They keep their caches otherwise, or have several blocks at different levels in one call, and
    what is driven here would be nothing, or the wrong latents.
    """
    lacks = _lacks(pipeline, _OF_ITS_LOOP)
    if "generator" not in lacks:
        lacks += _lacks(pipeline.generator.model.blocks[0].self_attn, _OF_ITS_ATTENTION)
    if not any(hasattr(pipeline, name) for name in _LEVELS):
        lacks.append(_LEVELS[0])
    if lacks:
        found = f"{type(pipeline).__name__} without {', '.join(lacks)}"
        raise LipassError(
            f"a rollout that is driven must be one of Self-Forcing's, got {found}; open chunks in "
            "a loop of your own"
        )


def _lacks(one: object, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(one, name)]


def _cache(pipeline: Any) -> Cache:
    attention, latent = pipeline.generator.model.blocks[0].self_attn, pipeline.frame_seq_length
    window = attention.max_attention_size // latent
    tokens = pipeline.kv_cache1[0]["k"].shape[1] if pipeline.kv_cache1 else window * latent
    return Cache(tokens // latent, window, attention.sink_size)


def _new_latents(pipeline: Any, history: int) -> int:
    alone = pipeline.independent_first_frame and not history
    return 1 if alone else int(pipeline.num_frame_per_block)


def _sigma_of(scheduler: Any, level: Any) -> float:
    return float(level) / float(getattr(scheduler, "num_train_timesteps", 1000))


FAMILY = Family(
    name="self_forcing",
    classes=("causal_model.CausalWanModel",),
    adopt=_adopt,
    drive=_drive,
)
