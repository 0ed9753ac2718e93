"""Mark steps, guarded regions and kept results in a graph, and how it is to be compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx

_STEP, _REGION, _INVARIANT = "lipass_step", "lipass_region", "lipass_invariant"
_INPUTS = "lipass_step_inputs"
_SKIPPED = "lipass_skipped_stages"


@dataclass(frozen=True)
class StepMark:
    """Say which denoising step of an unrolled loop a node belongs to."""

    index: int
    steps: int


@dataclass(frozen=True)
class StepInputs:
    """Say what each input of a graph that is one denoising step is; inputs by position."""

    names: tuple[str, ...]
    """Of all inputs, as the user's code calls them."""
    parameters: tuple[int, ...]
    """Weights and buffers."""
    conditions: tuple[int, ...]
    """Inputs that are the same in each step of a branch: text, cameras, history, sizes."""
    levels: tuple[int, ...]
    """Noise levels or timesteps, which change from step to step."""
    latents: tuple[int, ...]
    """What is denoised, and what has its shape."""
    denoised: int = 1
    """How many of the latents are denoised, by the outputs of their shape."""


def step_of(node: torch.fx.Node) -> StepMark | None:
    """Return the step that a node belongs to, if any."""
    step: StepMark | None = node.meta.get(_STEP)
    return step


def set_step(node: torch.fx.Node, step: StepMark) -> None:
    """Attach the step that a node belongs to."""
    node.meta[_STEP] = step


def clear_step(node: torch.fx.Node) -> None:
    """Take a node out of its step; it then runs in front of the loop."""
    node.meta.pop(_STEP, None)


def region_name(node: torch.fx.Node) -> str | None:
    """Return the name of the guarded region that a node stands for, if any.

    A call of an outlined step is `step 0`, `step 1`, ...; the output node is `call` if the whole
    graph is the region.
    """
    name: str | None = node.meta.get(_REGION)
    return name


def set_region(node: torch.fx.Node, name: str) -> None:
    """Mark a node as standing for a guarded region."""
    node.meta[_REGION] = name


def set_step_inputs(output: torch.fx.Node, inputs: StepInputs) -> None:
    """Say of a graph that is one denoising step what its inputs are."""
    output.meta[_INPUTS] = inputs


def step_inputs_of(output: torch.fx.Node) -> StepInputs | None:
    """Return what the inputs of a graph that is one denoising step are."""
    inputs: StepInputs | None = output.meta.get(_INPUTS)
    return inputs


def set_invariant(call: torch.fx.Node) -> None:
    """Mark the call of a body that runs again only where its inputs have changed."""
    call.meta[_INVARIANT] = True


def invariants(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """List the calls of such bodies, in order."""
    return [node for node in graph.find_nodes(op="call_module") if _INVARIANT in node.meta]


def skip_stage(graph: torch.fx.Graph, stage: str) -> None:
    """Ask that a graph is compiled without a stage of Inductor."""
    graph.owning_module.meta.setdefault(_SKIPPED, set()).add(stage)


def skipped_stages(gm: torch.fx.GraphModule) -> frozenset[str]:
    """Return the stages of Inductor that a graph is to be compiled without."""
    return frozenset(gm.meta.get(_SKIPPED, ()))
