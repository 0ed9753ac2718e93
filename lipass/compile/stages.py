"""Compile a graph without a stage of Inductor that would make it wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch._dynamo.backends.registry import lookup_backend

from lipass.passes.graph.compat import can_skip_stages, stages_skipped

Compiled = Callable[..., Any]
InnerCompile = Callable[[torch.fx.GraphModule, list[Any]], Compiled]


def without_stages(inner_compile: InnerCompile, stages: frozenset[str]) -> InnerCompile:
    """Return an inner compiler that leaves stages out; itself where there are none.

    Where this torch cannot leave a stage out, `aot_eager` compiles the graph: it has none.
    """
    if not stages:
        return inner_compile

    def compile_without(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Compiled:
        if not can_skip_stages():
            compiled: Compiled = lookup_backend("aot_eager")(gm, example_inputs)
            return compiled
        with stages_skipped(stages):
            return inner_compile(gm, example_inputs)

    return compile_without
