"""Keep what is true about a graph in `node.meta`, behind one accessor per kind of fact.

Facts say what is there, never what to do: deleting all of them leaves a correct, less optimised
graph. A fact holds sizes and names but no nodes, so that a rewrite cannot leave it dangling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.fx

from lipass.passes.compat import Size

Grid = tuple[Size, Size, Size]

_SITE, _POSES, _STEP, _REGION = "lipass_site", "lipass_poses", "lipass_step", "lipass_region"
_PIECES, _INVARIANT = "lipass_pieces", "lipass_invariant"


@dataclass(frozen=True)
class Segment:
    """Describe one run of keys of an attention call."""

    role: str
    """`text`, `history` or `current`."""
    tokens: Size
    grid: Grid
    """Latent grid `(T, Y, X)`, row-major; `(1, 1, L)` for text."""
    why: str
    """What the role was concluded from."""


@dataclass(frozen=True)
class AttentionSite:
    """Describe one attention call."""

    name: str
    """Module path, `@i` for the i-th repeat of the call, `#i` for the i-th in a module, role."""
    where: str
    """`file.py:line` of the call, or nothing."""
    role: str
    """`prefill`, `decode`, `cross`, `text` or `other`."""
    q_grid: Grid | None
    segments: tuple[Segment, ...]
    """Runs of keys in order; empty if the role is `other`."""
    scale: float
    reason: str = ""
    """Why the role is `other`, and for the rest what the role was concluded from."""
    proof: str = ""
    """What shows that q has the tokens of `q_grid`, in its order."""


@dataclass(frozen=True)
class PoseInput:
    """Describe a graph input that holds world-to-camera matrices `[B, F, 4, 4]`."""

    history_latents: Size
    """Leading cameras, of the context."""
    current_latents: Size
    """Trailing cameras, of the frames being denoised."""
    why: str


@dataclass(frozen=True)
class Step:
    """Say which denoising step of an unrolled loop a node belongs to."""

    index: int
    steps: int


def site_of(node: torch.fx.Node) -> AttentionSite | None:
    """Return the fact about an attention call, if there is one."""
    site: AttentionSite | None = node.meta.get(_SITE)
    return site


def set_site(node: torch.fx.Node, site: AttentionSite) -> None:
    """Attach the fact about an attention call."""
    node.meta[_SITE] = site


def sites(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, AttentionSite]]:
    """List the attention calls of a graph in order."""
    return [(node, node.meta[_SITE]) for node in graph.nodes if _SITE in node.meta]


def pieces_of(node: torch.fx.Node) -> tuple[tuple[str, ...], ...] | None:
    """Return the names of the nodes that the keys and the values of a call consist of, if set."""
    pieces: tuple[tuple[str, ...], ...] | None = node.meta.get(_PIECES)
    return pieces


def set_pieces(node: torch.fx.Node, pieces: tuple[tuple[str, ...], ...]) -> None:
    """Say which nodes hold the keys and the values of a call, where no concatenation does."""
    node.meta[_PIECES] = pieces


def set_poses(placeholder: torch.fx.Node, poses: PoseInput) -> None:
    """Attach the fact that a placeholder holds cameras."""
    placeholder.meta[_POSES] = poses


def poses(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, PoseInput]]:
    """List the camera inputs of a graph."""
    return [(node, node.meta[_POSES]) for node in graph.nodes if _POSES in node.meta]


def step_of(node: torch.fx.Node) -> Step | None:
    """Return the step that a node belongs to, if any."""
    step: Step | None = node.meta.get(_STEP)
    return step


def set_step(node: torch.fx.Node, step: Step) -> None:
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


def set_invariant(call: torch.fx.Node) -> None:
    """Mark the call of a body that runs again only where its inputs have changed."""
    call.meta[_INVARIANT] = True


def invariants(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """List the calls of such bodies, in order."""
    return [node for node in graph.find_nodes(op="call_module") if _INVARIANT in node.meta]


def module_path(node: torch.fx.Node) -> str:
    """Return the path of the innermost module whose call made the node, such as `blocks.0.attn`.

    A repeat of the outermost call is marked `@1`, `@2`, ...; the root module itself is nothing.
    """
    paths = module_paths(node)
    return paths[-1] if paths else ""


def module_paths(node: torch.fx.Node) -> list[str]:
    """Return the paths of the modules whose calls the node was made in, outermost first.

    A module need not be a part of the one that calls it.
    """
    stack = node.meta.get("nn_module_stack") or {}
    repeat = re.search(r"@\d+$", next(iter(stack), ""))
    paths = []
    for path, _ in stack.values():
        path = re.sub(r"^[LG]\['\w+'\]\.?", "", path)
        path = path.replace("__dict__['_modules']", "")
        path = re.sub(r"\._?modules\['(\w+)'\]|\['?(\w+)'?\]", r".\1\2", path)
        paths.append(path.strip(".") + (repeat.group() if repeat else ""))
    return paths


def without_repeat(name: str) -> str:
    """Return the name of a site without the `@i` of its call."""
    return re.sub(r"@\d+(?=:|$)", "", name)


def joint_name(names: list[str]) -> str:
    """Return one name for a site that several layers share, in the order in which they call."""
    return ",".join(names)


def names_of(joint: str) -> list[str]:
    """Return the names that a name joins; most names are alone."""
    return joint.split(",")


def call_line(node: torch.fx.Node) -> str:
    """Return `file.py:line` of the user's code that made the node, or nothing."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]}" if lines else ""
