"""Small models that generate a stream chunk by chunk from a cache: their call structure only.

Each yields the latents of its chunks, as eager code or compiled, with a session or without one.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lipass
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.self_forcing import build
from lipass.adapters.checkouts.self_forcing_loop import CHUNK, Given, new_caches
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, tokenize
from lipass.examples.tinyworld.rollout import SIGMAS
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_rollout import GrownCache, RingCache
from lipass.policy.trajectory import parse_trajectory
from lipass.testing.modules import forget_modules

Roll = Callable[..., Iterator[torch.Tensor]]
_CONTRACT = Path(__file__).parents[1] / "adapters" / "contracts" / "self_forcing"


@dataclass(frozen=True)
class Stream:
    """One streaming model.

    Attributes:
        opened: given options, or None for eager code, yields `roll(session)`.
        chunks: of a rollout.
        settled: chunks behind which nothing is compiled any more.
        options: what it needs to be told.
    """

    opened: Callable[..., contextlib.AbstractContextManager[Roll]]
    chunks: int
    settled: int
    options: dict[str, Any] = field(default_factory=dict)


def _tiny(ring: int | None) -> Callable[..., contextlib.AbstractContextManager[Roll]]:
    """TinyWorld's streaming model, with a cache that grows or a ring of so many chunks."""
    torch.manual_seed(0)
    model = StreamWorld(ModelConfig(width=48, heads=1, blocks=1, rows=4, columns=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval().requires_grad_(False)
    w2c = parse_trajectory("w-8,left-15,right-15", step_deg=9.0)
    text = model.text(tokenize("a room at dusk")[None])

    @contextlib.contextmanager
    def opened(options: dict[str, Any] | None) -> Iterator[Roll]:
        call: Callable[..., Any] = model
        if options is not None:
            call = torch.compile(model, backend="light_interaction", options=options, dynamic=True)

        def roll(session: lipass.Session | None) -> Iterator[torch.Tensor]:
            cache = GrownCache() if ring is None else RingCache(model, ring)
            history = torch.zeros(1, 16, 0, 4, 4)
            draw = torch.Generator().manual_seed(1)
            for start in range(0, _CHUNKS * CHUNK_LATENTS, CHUNK_LATENTS):
                here = slice(start, start + CHUNK_LATENTS)
                x = torch.randn(1, 16, CHUNK_LATENTS, 4, 4, generator=draw)
                held = cache.held if isinstance(cache, RingCache) else None
                with _chunk(session, w2c, here, history, held) as steps:
                    for sigma, after in steps(SIGMAS):
                        x = x + (after - sigma) * run(cache, x, sigma, here, False)
                    run(cache, x, 0.0, here, True)
                history = torch.cat([history, x], 2)
                yield x

        def run(cache, x, sigma, here, refresh):
            level = torch.full((1, CHUNK_LATENTS), sigma)
            return cache.forward(
                model if refresh else call,
                x,
                level,
                w2c[None, here],
                text,
                walls=None,
                refresh=refresh,
            )

        with torch.no_grad():
            yield roll

    return opened


_CHUNKS = 6


@contextlib.contextmanager
def _chunk(session, w2c, here, history, held):
    """Yield a function that gives the levels of the steps to compute, and those behind them."""
    if session is None:
        yield lambda sigmas: itertools.pairwise(sigmas)
        return
    past = {"poses": w2c[: here.start], "latents": history[0].transpose(0, 1)}
    given = past if here.start else {"poses": None}
    with session.chunk(**given, query=w2c[here], held=held) as chunk:
        yield lambda sigmas: ((one.sigma, one.sigma_next) for one in chunk.steps(sigmas))


@contextlib.contextmanager
def _self_forcing(options: dict[str, Any] | None) -> Iterator[Roll]:
    """A rolled cache with a sink, written in place at indices that are tensors, rotary keys."""
    pipeline, room = _rolled_pipeline(), 3 * CHUNK
    model = pipeline.generator.model

    def roll(session: lipass.Session | None) -> Iterator[torch.Tensor]:
        pipeline.kv_cache1, pipeline.crossattn_cache = new_caches(model)
        for layer in pipeline.kv_cache1:
            for name in ("k", "v"):
                layer[name] = layer[name][:, : room * pipeline.frame_seq_length].clone()
        torch.manual_seed(7)
        cameras = {} if session is None else {"poses": there_and_back(_CHUNKS, CHUNK)}
        with contextlib.nullcontext() if session is None else adoption.drive(session):
            noise = Given(_CHUNKS).noise
            _, latents = pipeline.inference(noise, ["x"], return_latents=True, **cameras)
        yield from latents.transpose(1, 2).split(CHUNK, 2)

    subject, family = (pipeline, {}) if options is not None else (model, {"family": "any"})
    with torch.no_grad(), lipass.adopt(subject, **family) as adoption:
        if options is not None:
            model.compile(backend="light_interaction", options=options)
        try:
            yield roll
        finally:
            model._compiled_call_impl = None


@functools.cache
def _rolled_pipeline():
    forget_modules(_ROOTS)
    pipeline = build(_CONTRACT, layers=1).pipeline
    attention = pipeline.generator.model.requires_grad_(False).blocks[0].self_attn
    attention.local_attn_size, attention.sink_size = 3 * CHUNK, 1
    attention.max_attention_size = 3 * CHUNK * pipeline.frame_seq_length
    return pipeline


def forget_checkout():
    """Forget the code of the miniature checkout, whose modules have common names."""
    _rolled_pipeline.cache_clear()
    if str(_CONTRACT) in sys.path:
        sys.path.remove(str(_CONTRACT))
    forget_modules(_ROOTS)


_ROOTS = ("wan", "pipeline", "utils")
_SMALL = {"sparse.dense_tokens": 0, "sparse.dense_chunks": 0}

STREAMS = {
    "tinyworld, grown": Stream(_tiny(None), _CHUNKS, 3, {**_SMALL, "sparse.tile": (1, 4, 4)}),
    "tinyworld, ring": Stream(_tiny(3), _CHUNKS, 5, {**_SMALL, "sparse.tile": (1, 4, 4)}),
    "self-forcing": Stream(
        _self_forcing,
        _CHUNKS,
        4,
        {**_SMALL, "sparse.tile": (1, 4, 4), "chunk_latents": CHUNK},
    ),
}
