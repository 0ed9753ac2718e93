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

from lipass.adapters.adoption import options_told, refuse_lints
from lipass.compile.left_eager import listen
from lipass.config import SECTIONS, Config
from lipass.passes.graph.frame import compiled_frame
from lipass.switch import process_is_off

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
    model = compiled_frame()[1]
    config = Config.resolve(mode, {**options_told(model), **(options or {})})
    if process_is_off():
        return inner_compile(gm, example_inputs, config.inner)
    if config.strict:
        refuse_lints(model)
    plain = config.preset == "off" and config.pipeline is None
    # Of these sessions alone read `grow`.
    if plain and not any(getattr(config, name) for name in SECTIONS if name != "grow"):
        from lipass.compile.plain import counted, telling

        with counted(config):
            return telling(inner_compile(gm, example_inputs, config.inner), gm, config)
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
    from lipass.passes.core import PassPipeline, pass_class
    from lipass.passes.joined import names_in

    options = config.to_options()
    on = {name for name in SECTIONS if options[name]}
    text = config.pipeline if config.pipeline is not None else names_in(config.preset, on)
    pipeline = PassPipeline.parse(text, options)
    for name in config.disable:
        pass_class(name)  # raises for a name that is none
    return PassPipeline(tuple(one for one in pipeline if one.name not in config.disable))


listen(light_interaction)
