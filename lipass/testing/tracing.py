"""Get the graph that passes see of a function, and run passes on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

import lipass.compile.unit  # noqa: F401 (registers the operators that passes insert)
from lipass.compile.gate import measured_gate
from lipass.passes.core import Note, Pass, PassContext, PassPipeline, pass_class
from lipass.passes.printer import print_graph
from lipass.passes.runner import PassRun, run_pipeline

Pipeline = str | Pass | PassPipeline


@dataclass(frozen=True)
class Traced:
    """Hold the latest graph of a function behind a pipeline.

    Attributes:
        gm: the graph.
        before: the graph as printed in front of the last pass.
        records: one per pass, with diffs.
        outputs: what the rewritten graph computed from the arguments.
    """

    gm: torch.fx.GraphModule
    before: str
    records: list[PassRun]
    outputs: Any

    @property
    def diff(self) -> str:
        """Removed and added lines of the last pass."""
        return self.records[-1].diff if self.records else ""

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the last pass said."""
        return self.records[-1].notes if self.records else ()


def trace(
    fn: Callable[..., Any], args: Sequence[Any], grown: Sequence[Any] | None = None
) -> torch.fx.GraphModule:
    """Return Dynamo's graph of `fn(*args)`; sizes that differ in `grown` are symbolic.

    Raises:
        ValueError: if Dynamo makes no graph or several.
    """
    return run_passes(fn, args, "", grown=grown).gm


def run_passes(
    fn: Callable[..., Any],
    args: Sequence[Any],
    pipeline: Pipeline,
    *,
    grown: Sequence[Any] | None = None,
) -> Traced:
    """Compile `fn` with the passes of a pipeline only, and call it.

    Args:
        fn: function or module, called without recording gradients.
        args: its arguments.
        pipeline: passes to run.
        grown: arguments of a second call, so that the sizes in which they differ are symbolic.

    Raises:
        PassError: when a pass fails.
        ValueError: if Dynamo makes no graph, or several of one call.
    """
    passes = as_pipeline(pipeline)
    made: list[tuple[torch.fx.GraphModule, str, list[PassRun]]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        first = print_graph(gm.graph)
        records = run_pipeline(passes, gm, PassContext.of(gm.graph, measured_gate), diff=True)
        made.append((gm, records[-1].before if records else first, records))
        return gm.forward

    torch._dynamo.reset()
    calls = [args] if grown is None else [args, grown]
    outputs = None
    try:
        compiled = torch.compile(fn, backend=backend)
        with torch.no_grad():
            for given in calls:
                outputs = compiled(*given)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from error
    finally:
        torch._dynamo.reset()
    if not 1 <= len(made) <= len(calls):
        raise ValueError(
            f"a call must make one graph, got {len(made)} of {len(calls)} calls; see "
            "`lipass inspect` for the graph breaks"
        )
    gm, before, records = made[-1]
    return Traced(gm, before, records, outputs)


def as_pipeline(pipeline: Pipeline) -> PassPipeline:
    """Return a pipeline from its text, or from one pass and those that it requires."""
    if isinstance(pipeline, str):
        return PassPipeline.parse(pipeline)
    if isinstance(pipeline, Pass):
        return PassPipeline((*_required(pipeline, set()), pipeline))
    return pipeline


def _required(one: Pass, seen: set[str]) -> list[Pass]:
    found: list[Pass] = []
    for name in one.requires:
        if name not in seen:
            seen.add(name)
            # Parsed alone a pass that requires others is refused, so it is made by its class.
            needed = pass_class(name)()
            found += [*_required(needed, seen), needed]
    return found
