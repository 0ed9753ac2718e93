"""Run passes on every graph that Dynamo makes of a target, and keep why it made several."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lipass.cli import UsageError
from lipass.cli.failures import raised
from lipass.cli.target import Target, load
from lipass.compile.graph_breaks import GraphBreak, break_of, distinct
from lipass.errors import LipassError

if TYPE_CHECKING:
    import torch.fx

    from lipass.passes.core import PassPipeline
    from lipass.passes.runner import PassRun

_FACTS = ("canonicalize", "find-attention", "find-poses", "find-steps")


@dataclass(frozen=True)
class TracedGraph:
    """Hold one graph of Dynamo in three states.

    Attributes:
        original: as Dynamo made it.
        facts: annotated by the passes that find things; every repeat is still in place.
        rewritten: after the whole pipeline.
        records: one per pass of the pipeline, with diffs.
    """

    original: torch.fx.GraphModule
    facts: torch.fx.GraphModule
    rewritten: torch.fx.GraphModule
    records: list[PassRun]


@dataclass
class Trace:
    """Hold the graphs and graph breaks of a target.

    Attributes:
        graphs: in the order in which Dynamo made them.
        breaks: each place once.
        seconds: wall time of everything, the making of the model included.
        fake: whether the tensors were fake.
        why_real: why they were not, or nothing.
    """

    graphs: list[TracedGraph] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    seconds: float = 0.0
    fake: bool = True
    why_real: str = ""


class Observer(Protocol):
    """Take down what is only known while Dynamo still has its symbols."""

    def clear(self) -> None:
        """Forget all graphs: the first comes, or real tensors are tried in place of fake ones."""

    def add(self, traced: TracedGraph) -> None:
        """Take down one graph."""


def trace_target(
    text: str,
    pipeline: PassPipeline,
    *,
    fake: bool | None = None,
    dynamic: bool | None = None,
    observers: Sequence[Observer] = (),
) -> Trace:
    """Load a target and trace it.

    Args:
        text: `module:callable` or `file.py:callable`.
        pipeline: passes to run on each graph.
        fake: fake tensors, real ones, or (None) fake ones where the callable can do with them.
        dynamic: as `torch.compile` takes it.
        observers: shown each graph.

    Raises:
        UsageError: for a target that cannot be loaded.
        LipassError: if the callable, the model or a pass fails.
    """
    begin = time.perf_counter()

    def attempt(*, fake: bool) -> Trace:
        for observer in observers:
            observer.clear()
        return trace_calls(load(text, fake), pipeline, dynamic=dynamic, observers=observers)

    why_real = "" if fake is not False else "asked for"
    if fake is not False:
        try:
            trace = attempt(fake=True)
        except LipassError as error:
            if fake or _is_of_a_pass(error):
                raise
            why_real = str((error.__cause__ and raised(error.__cause__)) or error)
            print(f"lipass: fake tensors do not do here, it {why_real}", file=sys.stderr)
        else:
            trace.seconds = time.perf_counter() - begin
            return trace
    trace = attempt(fake=False)
    trace.fake, trace.why_real = False, why_real
    trace.seconds = time.perf_counter() - begin
    return trace


def trace_calls(
    target: Target,
    pipeline: PassPipeline,
    *,
    dynamic: bool | None = None,
    observers: Sequence[Observer] = (),
) -> Trace:
    """Trace the calls of a target that is loaded; see `trace_target`."""
    import torch
    from torch._dynamo.utils import graph_break_reasons

    import lipass.compile.unit  # noqa: F401 (registers the ops that passes insert)

    trace = Trace()

    def record(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        traced = _run_passes(gm, pipeline)
        for observer in observers:
            observer.add(traced)
        trace.graphs.append(traced)

        def run(*args: Any) -> Any:
            with target.active():
                return gm.forward(*args)

        return run

    torch._dynamo.reset()
    known = len(graph_break_reasons)
    compiled = torch.compile(target.model, backend=record, dynamic=dynamic)
    try:
        # What the model prints must not end up in a JSON document.
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            for index in range(len(target.calls)):
                target.call(compiled, index)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise LipassError(str(error.inner_exception)) from error.inner_exception
    except (Exception, SystemExit) as error:
        raise LipassError(f"{target.text} must run, and {raised(error)}") from error
    trace.breaks = distinct(map(break_of, graph_break_reasons[known:]))
    return trace


def pipeline_for(options: dict[str, Any], added: list[str] | None = None) -> PassPipeline:
    """Build the passes that the backend would run, and those of `added` behind what rewrites.

    Layers are outlined last, because a pass sees only what is in the graph itself.

    Raises:
        UsageError: for a preset, option or pass that does not exist, or an order that a pass does
            not allow.
    """
    from lipass.backend import pipeline_of
    from lipass.config import Config
    from lipass.passes.core import PassPipeline

    try:
        config = Config.resolve(None, options)
        # `off` goes to the inner compiler without any pass, not even those that only look.
        looks = config.preset != "off" or config.pipeline is not None
        pipeline = pipeline_of(config) if looks else PassPipeline()
        more = PassPipeline.parse(",".join(added or ()))
        last = [one for one in pipeline if one.name == "share-blocks"]
        return PassPipeline((*(one for one in pipeline if one not in last), *more, *last))
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _is_of_a_pass(error: LipassError) -> bool:
    from lipass.passes.core import PassError

    return isinstance(error.__cause__, PassError)


def _run_passes(gm: torch.fx.GraphModule, pipeline: PassPipeline) -> TracedGraph:
    from lipass.compile.gate import measured_gate
    from lipass.passes.core import PassContext, PassPipeline
    from lipass.passes.runner import run_pipeline

    finders = PassPipeline(tuple(one for one in pipeline if one.name in _FACTS))
    if len(finders.passes) < len(_FACTS):
        finders = PassPipeline.parse(",".join(_FACTS))
    facts = _copy(gm)
    run_pipeline(finders, facts, PassContext.of(facts.graph))
    rewritten = _copy(gm)
    ctx = PassContext.of(rewritten.graph, measured_gate)
    records = run_pipeline(pipeline, rewritten, ctx, diff=True)
    return TracedGraph(gm, facts, rewritten, records)


def _copy(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Copy the graph and share the weights; copying them would double a large model."""
    import torch.fx

    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return torch.fx.GraphModule(gm, graph)
