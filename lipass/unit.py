"""Run a compiled graph behind its host guard."""

from __future__ import annotations

from typing import Any

import torch

import lipass.kernels.ops  # noqa: F401
from lipass.passes.core import PassContext, PassPipeline
from lipass.passes.runner import run_pipeline


def compile_unit(gm, example_inputs, config, pipeline: PassPipeline):
    from lipass.backend import inner_compile
    ctx = PassContext.of(gm.graph)
    run_pipeline(pipeline, gm, ctx)
    for n in ctx.notes: print(n)
    return inner_compile(gm, example_inputs, config.inner)
