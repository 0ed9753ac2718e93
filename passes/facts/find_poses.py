"""Find the graph input that holds the cameras of the history and of the frames being denoised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from lipass.passes.attention.cameras import is_matrices
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import AttentionSite, PoseInput, set_poses, sites
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import Size, guard, holds_now, value
from lipass.passes.graph.writes import memory_written, storage


@dataclass(frozen=True)
class FindPoses(Pass):
    """Attach a `PoseInput` to the camera matrices; rewrite nothing.

    ::

        %w2c: f32[1, n + 4, 4, 4] = input       (history n latents, current 4)

    An input `[B, F, 4, 4]` of floats holds the cameras if `F = T_history + T_current` (proven, or
    made a guard) with the grids of the attention sites; where there is no history yet (prefill),
    if `F > T`. The cameras of the history come first.

    Keeps: graphs without prefill and decode sites; sites that disagree on the number of latents;
    two inputs that both fit: `input` names one then.
    """

    name: ClassVar[str] = "find-poses"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)

    input: str | None = None
    """Name of the input that holds the cameras, as the printer shows it without `l_` and `_`."""

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        candidates = [
            node
            for node in graph.find_nodes(op="placeholder")
            if is_matrices(node) and self.input in (None, node.name.removeprefix("l_").strip("_"))
        ]
        if not candidates:
            ctx.note("cameras", "kept", "no input is [B, F, 4, 4]")
            return False
        found = [(node, fact) for node in candidates if (fact := _fit(node, graph)) is not None]
        matches = [(node, fact) for node, fact in found if isinstance(fact, PoseInput)]
        if len(matches) != 1:
            reasons = [f"{node.name}: {fact.reason}" for node, fact in found if _refused(fact)]
            several = (
                f"{', '.join(n.name for n, _ in matches)} all fit; set find-poses{{input=..}}"
            )
            ctx.note("cameras", "kept", several if matches else "; ".join(reasons))
            return False
        node, fact = matches[0]
        set_poses(node, fact)
        ctx.note("cameras", "found", f"{node.name}: {fact.why}")
        return False


def _refused(fact: PoseInput | Refusal) -> bool:
    return isinstance(fact, Refusal)


def _fit(node: Node, graph: Graph) -> PoseInput | Refusal:
    """Check the number of cameras against the grids of the sites."""
    if any(storage(value(node)) in memory_written(n) for n in graph.nodes):
        return Refusal("it is written to")
    cameras: Size = value(node).shape[1]
    found = [site for _, site in sites(graph) if site.role in ("prefill", "decode")]
    decode = [site for site in found if site.role == "decode"]
    if not found:
        return Refusal("no prefill or decode site says how many latents there are")
    if decode:
        history, current = _history(decode[0]), _current(decode[0])
        for site in decode[1:]:
            if not guard(_history(site) == history) or not guard(_current(site) == current):
                return Refusal(f"{decode[0].name} and {site.name} differ in latents")
        if not guard(cameras == history + current):
            return Refusal(
                f"{cameras} cameras for {history} history and {current} current latents"
            )
        return PoseInput(history, current, f"{cameras} = {history} history + {current} current")
    history = _current(found[0])
    if not holds_now(cameras > history) or not guard(cameras > history):
        return Refusal(f"{cameras} cameras for {history} latents; none for frames to come")
    current = cameras - history
    return PoseInput(history, current, f"{cameras} = {history} being encoded + {current} to come")


def _history(site: AttentionSite) -> Size:
    total: Size = 0
    for segment in site.segments:
        if segment.role == "history":
            total = total + segment.grid[0]
    return total


def _current(site: AttentionSite) -> Size:
    assert site.q_grid is not None
    return site.q_grid[0]
