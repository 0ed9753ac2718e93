"""Build what runs in place of one graph: passes, inner compiler, host guard."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

# Importing ops registers an operator that passes insert; so do the imports beside it.
import lipass.kernels.chosen_latents
import lipass.kernels.merged_history
import lipass.kernels.ops
import lipass.kernels.steering_bias
import lipass.kernels.view_overlap.api  # noqa: F401
from lipass import kernels
from lipass.compile.cut_graph import compile_parts, outlined
from lipass.compile.dense_twin import DenseTwin, leaves_out, pipeline_of_twin
from lipass.compile.gate import measured_gate
from lipass.compile.graph_breaks import break_of
from lipass.compile.hidden import is_whole, refuse_unseen, watched
from lipass.compile.models import model_of
from lipass.compile.reading import GraphReading, Reading
from lipass.compile.sites import (
    found_in,
    graphs_of,
    makes_sparse,
    refuse_dense,
    refuse_unmerged,
    site_records,
    tell_gradients,
)
from lipass.compile.stages import without_stages
from lipass.config import Config
from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.kernels.calibration import cpu_rates, sorted_rates
from lipass.kernels.fastest import GpuKind
from lipass.kernels.gpu_calibration import calibrate
from lipass.passes import runner
from lipass.passes.attention.site import OVER_LATENTS
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import PassContext, PassError, PassPipeline
from lipass.passes.graph.compat import hint, start_again_with_constants, undisturbed
from lipass.passes.graph.frame import is_recompile
from lipass.passes.graph.marks import StepInputs, skipped_stages, step_inputs_of
from lipass.policy.blocks import roles_that_stay_sparse
from lipass.receipt import PassRecord, SiteRecord, current_report
from lipass.runtime.chosen_context import chosen_by_caller
from lipass.runtime.chunk import Chunk
from lipass.runtime.coarse_steps import WHY_DENSE
from lipass.runtime.kept_plans import KeptPlans
from lipass.runtime.merged_history import unmerged
from lipass.runtime.scope import current_chunk, current_step
from lipass.switch import is_off

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
InnerCompile = Callable[[torch.fx.GraphModule, list[Any]], Compiled]

_ATTENTION = (
    torch.ops.lipass.sparse_attention.default,
    torch.ops.lipass.attend_pieces.default,
    torch.ops.lipass.attend_merged.default,
)


class CompiledUnit:
    """Call a compiled graph as the session that is open wants it.

    Attributes:
        inputs: what its inputs are if the graph is one denoising step, which the session may
            answer from what an earlier one returned; None for graphs that always compute.
        twin: what runs instead where nothing is left out; None where nothing ever is.
        reading: what its calls read of the history, compared with what a session decided.
        plans: what its calls may follow; None where each chooses its own blocks.
    """

    def __init__(self, compiled: Compiled, inputs: StepInputs | None = None) -> None:
        self.compiled = compiled
        self.inputs = inputs
        self.twin: DenseTwin | None = None
        self.reading: GraphReading | None = None
        self.plans: KeptPlans | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the graph, or answer from what is kept."""
        if is_off():
            # What `lipass.attend` has planted has no twin, and would choose by cameras.
            with registry.force("dense", "lipass.disabled()"), unmerged(), chosen_by_caller(None):
                return (self.twin or self).compiled(*args)
        step = current_step() if self.inputs is not None else None
        if self.inputs is None or step is None:
            return self._compute(args)
        return step.call(self, self.inputs, args, self._compute)

    def _compute(self, args: tuple[Any, ...]) -> Any:
        chunk = current_chunk()
        if chunk is not None and chunk.coarse.running:
            return self._on_half_of_the_grid(chunk, args)
        reading = self.reading.of_call(chunk, args) if self.reading else Reading()
        chosen = reading.chosen
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(registry.one_call())
            if self.plans is not None:
                scopes.enter_context(self.plans.answering(chunk))
            if chunk is None:
                return self.compiled(*args)
            scopes.enter_context(chunk.session.histories.answering(chunk.plan.stream))
            scopes.enter_context(chunk.session.prompts.scores.answering(chunk))
            if self.twin is not None and chosen is None:
                why = self.twin.why_dense(chunk, reading.dense_reason)
                if why is not None:
                    return self.twin.run(args, chunk, why)
            if (reason := chunk.plan.dense_reason or reading.dense_reason) is not None:
                sparse = roles_that_stay_sparse(chunk.session.config)
                scopes.enter_context(registry.force("dense", reason, but_roles=sparse))
            if chunk.chooses:
                scopes.enter_context(chosen_by_caller(chosen, reading.latents))
            return self.compiled(*args)

    def _on_half_of_the_grid(self, chunk: Chunk, args: tuple[Any, ...]) -> Any:
        """Run the model's own attention: in a history, tokens of a latent are as many as ever."""
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(registry.one_call())
            scopes.enter_context(chunk.session.prompts.scores.answering(chunk))
            scopes.enter_context(registry.force("dense", WHY_DENSE))
            scopes.enter_context(unmerged())
            if chunk.chooses:  # what `lipass.attend` has planted has no twin, and would choose too
                scopes.enter_context(chosen_by_caller(None))
            if self.twin is not None:
                return self.twin.run(args, chunk, WHY_DENSE)
            return self.compiled(*args)


def compile_unit(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    config: Config,
    pipeline: PassPipeline,
    inner_compile: InnerCompile,
    *,
    keep_going: bool = False,
) -> Compiled:
    """Run the passes on a graph, compile it, and record both in the report.

    Args:
        gm: Dynamo's graph.
        example_inputs: its fake inputs.
        config: the options.
        pipeline: the passes.
        inner_compile: compiles what the passes leave.
        keep_going: compile without a pass that fails, instead of raising.

    Raises:
        LipassError: when a pass fails, or when `strict` is set and a site stays dense.
    """
    begin = time.perf_counter()
    ctx = PassContext.of(gm.graph, measured_gate)
    twin_passes = pipeline_of_twin(pipeline)
    untouched = None if twin_passes is None else _copy(gm)
    try:
        runs = runner.run_pipeline(pipeline, gm, ctx, keep_going=keep_going)
    except PassError as error:
        raise LipassError(str(error)) from error
    report = current_report()
    why = getattr(gm, "compile_subgraph_reason", None)
    if why and why.graph_break:
        report.add_graph_break(break_of(why))
    for record in runs:
        notes = tuple(f"{note.site}: {note.action}, {note.reason}" for note in record.notes)
        report.add_pass(
            PassRecord(record.name, record.changed, record.seconds, notes, record.failure)
        )
    if ctx.constant_floats:
        start_again_with_constants(ctx.constant_floats)
    found, model = found_in(gm), model_of(gm)
    records = site_records(found, pipeline, ctx.notes, model.name)
    owner = report.add_sites(records, part=model.part)
    if config.strict:
        refuse_dense(found, pipeline, ctx.notes)
        refuse_unmerged(found, ctx.notes)
    tell_gradients(records, pipeline, model.name)
    watches = config.strict and makes_sparse(pipeline)
    if watches:
        refuse_unseen(gm)
    _prepare_kernels(gm)
    compiled = _compile(gm, example_inputs, inner_compile)
    # What `lipass.attend` has planted is dense where it has to be, and counts by itself.
    if untouched is not None and leaves_out(untouched):
        untouched = None
    if twin_passes and untouched and isinstance(compiled, CompiledUnit) and leaves_out(gm):
        ctx_of_twin = PassContext.of(untouched.graph, measured_gate)
        runner.run_pipeline(twin_passes, untouched, ctx_of_twin, keep_going=keep_going)
        twin = _compile(untouched, example_inputs, inner_compile)
        compiled.twin = DenseTwin(twin.compiled if isinstance(twin, CompiledUnit) else twin, gm)
    if isinstance(compiled, CompiledUnit):
        compiled.reading = GraphReading(config, pipeline, gm, found)
        compiled.plans = KeptPlans.of(config.sparse)
    if watches:
        compiled = watched(compiled, len(found), whole=is_whole(why))
    seconds, again = time.perf_counter() - begin, is_recompile()
    report.add_graph(seconds, recompile=again, preset=config.preset)
    _log(model.name, records, seconds, again)
    return model.counting(compiled, records, owner)


def _compile(
    gm: torch.fx.GraphModule, example_inputs: list[Any], inner_compile: InnerCompile
) -> Compiled:
    inner_compile = without_stages(inner_compile, skipped_stages(gm))
    inputs = step_inputs_of(gm.graph.output_node())
    of_latents = any(site.role in OVER_LATENTS for site in found_in(gm))
    asks = inputs is not None or bool(outlined(gm.graph)) or of_latents or _has_operators(gm)
    if outlined(gm.graph):
        compiled = compile_parts(gm, example_inputs, inner_compile)
    else:
        compiled = inner_compile(gm, example_inputs)
    return CompiledUnit(compiled, inputs) if asks else compiled


def _copy(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return torch.fx.GraphModule(gm, graph)


def _has_operators(gm: torch.fx.GraphModule) -> bool:
    """Whether passes have put an operator in that counts its calls or asks the session."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lipass"
        for graph in graphs_of(gm)
        for node in graph.nodes
    )


def _prepare_kernels(gm: torch.fx.GraphModule) -> None:
    """Build and measure what runs: everybody waits for a compilation, not for a frame."""
    nodes = [node for graph in graphs_of(gm) for node in graph.nodes if node.target in _ATTENTION]
    _measure_gpus(nodes)
    calls = [
        (node.meta["example_value"], node.kwargs.get("planner") == "buckets") for node in nodes
    ]
    kinds = {
        (out.dtype, int(out.shape[3]), sorts) for out, sorts in calls if out.device.type == "cpu"
    }
    if not kinds:
        return
    kernels.prepare()
    with undisturbed():
        for dtype, dim, sorts in kinds:
            (sorted_rates if sorts else cpu_rates)(dtype, dim, torch.get_num_threads())


def _measure_gpus(nodes: list[torch.fx.Node]) -> None:
    """Measure attention on the GPUs of sparse calls, once for each kind of them."""
    kinds = set()
    for node in filter(SparseCall.is_one, nodes):
        out = node.meta["example_value"]
        if out.device.type == "cuda":
            kv, _ = SparseCall.of(node).layout(hint)
            given = out.device, out.dtype, int(out.shape[3])
            kinds.add(GpuKind(*given, kv.block_tokens, kv.in_runs))
    with undisturbed():
        for kind in kinds:
            calibrate(kind)


def _log(model: str, records: list[SiteRecord], seconds: float, again: bool) -> None:
    rewritten = sum(one.action == "rewritten" for one in records)
    log.info(
        "%s of %s in %.2f s: %d of %d attention sites rewritten",
        "a graph compiled again" if again else "a graph compiled",
        model or "a function",
        seconds,
        rewritten,
        len(records),
    )
    for one in records:
        log.debug("  %s: %s, %s", one.name, one.action, one.reason)
