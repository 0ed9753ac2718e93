"""Hold a world model in miniature and the way from a function to the graph that passes see."""

import sys
from pathlib import Path

import pytest
import torch

import lipass.kernels.chosen_latents
import lipass.kernels.ops
import lipass.kernels.view_overlap.api  # noqa: F401  (all register operators)
from lipass.compile.gate import measured_gate
from lipass.passes.core import PassContext, PassPipeline
from lipass.passes.runner import run_pipeline

sys.path.insert(0, str(Path(__file__).parent))  # for `mini`, `spellings`, `attending`

from mini import Inputs, Mini


@pytest.fixture
def mini():
    torch.manual_seed(0)
    return Mini().eval()


@pytest.fixture
def inputs():
    return Inputs


@pytest.fixture
def trace():
    """Return Dynamo's graph of `fn(*args)`; sizes that differ in `grown` are dynamic."""

    def run(fn, args, grown=None):
        graphs = []

        def keep(gm, example_inputs):
            graphs.append(gm)
            return gm.forward

        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(fn, backend=keep)
            compiled(*args)
            if grown is not None:
                compiled(*grown)
        torch._dynamo.reset()
        return graphs[-1]

    return run


@pytest.fixture
def apply():
    """Run a pipeline on a graph; returns the records, with diffs, and the context."""

    def run(gm, text, **options):
        ctx = PassContext.of(gm.graph, measured_gate)
        records = run_pipeline(PassPipeline.parse(text, options), gm, ctx, diff=True)
        return records, ctx

    return run


@pytest.fixture
def notes(trace, apply):
    """Return `(site, action, reason)` of the last pass of a pipeline on `fn(*args)`."""

    def run(fn, args, text, grown=None):
        records, _ = apply(trace(fn, args, grown), text)
        return [(note.site, note.action, note.reason) for note in records[-1].notes]

    return run
