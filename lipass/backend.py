"""Answer `torch.compile(backend="light_interaction")`: run the passes, then an inner compiler.

torch finds this module through the entry-point group `torch_dynamo_backends` and imports it on
first use, so nothing heavy is imported at the top.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from lipass.config import Config

if TYPE_CHECKING:
    from lipass.passes.core import PassPipeline

Compiled = Callable[..., Any]


def light_interaction(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one graph of Dynamo.

    Args:
        gm: Dynamo's graph.
        example_inputs: its fake inputs.
        mode: a preset, the short form of `options={"preset": ...}`.
        options: flat options of `lipass.Config.resolve`.

    Raises:
        ValueError: for an unknown preset or option, or a pipeline that does not parse.
        LipassError: when `strict` is set and a pass fails or a site stays dense.
    """
    config = Config.resolve(mode, options)
    plain = config.preset == "off" and config.pipeline is None
    if plain and not any(_sections(config).values()):
        return inner_compile(gm, example_inputs, config.inner)
    from lipass.compile.unit import compile_unit
    from lipass.passes.identity import code_uuid

    pipeline = pipeline_of(config)
    inner = functools.partial(inner_compile, inner=config.inner)
    caches: Any = torch.compiler.config
    # What the result depends on and the graph does not show becomes part of torch's keys.
    with caches.patch(cache_key_tag=caches.cache_key_tag + code_uuid(pipeline)):
        keep_going = not config.strict
        return compile_unit(gm, example_inputs, config, pipeline, inner, keep_going=keep_going)


def inner_compile(gm: torch.fx.GraphModule, example_inputs: list[Any], inner: str) -> Compiled:
    """Compile a graph with `inductor`, `aot_eager` or `eager`."""
    from torch._dynamo.backends.registry import lookup_backend

    compiled: Compiled = lookup_backend(inner)(gm, example_inputs)
    return compiled


def pipeline_of(config: Config) -> PassPipeline:
    """Build the passes of a config: its own pipeline, or those that its sections ask for."""
    from lipass.passes import PIPELINES
    from lipass.passes.core import PassPipeline, pass_class

    text = config.pipeline
    if text is None:
        off = {name for name, section in _sections(config).items() if section is None}
        text = ",".join(name for name in PIPELINES["all"].split(",") if name not in off)
    pipeline = PassPipeline.parse(text, _pass_options(config))
    for name in config.disable:
        pass_class(name)  # raises for a name that is none
    return PassPipeline(tuple(one for one in pipeline if one.name not in config.disable))


def _sections(config: Config) -> dict[str, object]:
    """Map the passes that approximate to the section of the config that switches them on."""
    return {
        "prune-context": config.context,
        "sparse-attention": config.sparse,
        "pool-history": config.sparse,
        "guard-steps": config.steps,
    }


def _pass_options(config: Config) -> dict[str, dict[str, object]]:
    """Map the sections of a config to options of passes."""
    checks: dict[str, object] = {
        "verify": config.verify == "first",
        "strict": config.strict and config.verify == "first",
    }
    options: dict[str, dict[str, object]] = {
        "canonicalize": dict(checks),
        "find-attention": dict(checks),
        "hoist-calls": {"counted_writes": config.counted_writes},
        "carry-floats": {"inner": config.inner},
        "avoid-faults": {"inner": config.inner},
    }
    if context := config.context:
        options["prune-context"] = {
            "overlap_min": context.overlap_min,
            "sink_latents": context.sink_latents,
            "window_latents": context.window_chunks_max * context.chunk_latents,
            "hfov_deg": context.hfov_deg,
            "vfov_deg": context.vfov_deg,
            "near": context.near,
            "far": context.far,
        }
    if sparse := config.sparse:
        options["find-attention"]["token_grid"] = sparse.token_grid
        options["sparse-attention"] = {
            "tile": sparse.tile + (sparse.query_tile or ()),
            "budget_prefill": sparse.budget_prefill,
            "budget_decode": sparse.budget_decode,
            "sink_latents": sparse.sink_latents,
            "dense_layers": sparse.dense_layers,
        }
    return options
