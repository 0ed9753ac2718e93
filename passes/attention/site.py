"""Keep what is true about a graph in `node.meta`, behind one accessor per kind of fact.

Facts say what is there, never what to do: deleting all of them leaves a correct, less optimised
graph. A fact holds sizes, names and
places but no nodes, so that a rewrite cannot leave it dangling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.fx

from lipass.passes.graph.arguments import set_arguments
from lipass.passes.graph.compat import Size

SDPA = torch.nn.functional.scaled_dot_product_attention
"""The one spelling of attention that `canonicalize` leaves."""

Grid = tuple[Size, Size, Size]

OVER_LATENTS = ("prefill", "self", "decode")
"""Roles of attention over a latent grid, whose blocks may be chosen."""

_SITE, _POSES = "lipass_site", "lipass_poses"


@dataclass(frozen=True)
class KeySegment:
    """Describe one run of keys of an attention call."""

    role: str
    """`text`, `history` or `current`."""
    tokens: Size
    grid: Grid
    """Latent grid `(T, Y, X)`, row-major; `(1, 1, L)` for text."""
    why: str
    """What the role was concluded from."""
    pieces: tuple[int, ...] = ()
    """Pieces of the keys that are joined, such as a sink and a window; () is that in its place."""


class OperandPlaces(NamedTuple):
    """Say which arguments of a call are its operands, by position or by name.

    Places stay true while what is computed in front of the call changes.
    """

    q: int | str
    k: int | str
    v: int | str
    scale: int | str | float | None = None
    """Place of the softmax scale, or the scale; `D ** -0.5` where there is none."""


class CacheSlots(NamedTuple):
    """Say where in a cache that a call writes to its history lies, in tokens."""

    capacity: Size
    """Of the cache."""
    reads: tuple[tuple[Size, Size], ...]
    """First place of each piece of the history and the one behind it, as the pieces are joined."""
    written: Size
    """First place that the call writes its own keys to."""
    moved: bool
    """Whether the call also moves what the cache holds, as rolling it does."""


@dataclass(frozen=True)
class AttentionSite:
    """Describe one attention call."""

    name: str
    """Module path, `@i` for the i-th repeat of the call, `#i` for the i-th in a module, role."""
    where: str
    """`file.py:line` of the call, or nothing."""
    role: str
    """`prefill`, `self`, `decode`, `cross`, `text` or `other`."""
    q_grid: Grid | None
    segments: tuple[KeySegment, ...]
    """Runs of keys in order; empty if the role is `other`."""
    scale: float
    reason: str = ""
    """Why the role is `other`, and for the rest what the role was concluded from."""
    proof: str = ""
    """What shows that q has the tokens of `q_grid`, in its order."""
    latents_first: bool | None = None
    """Of queries that hold text too, whether it comes behind the latents; None for others."""
    latent_mask: bool = False
    """Whether a mask of the call says which latents see which."""
    operands: OperandPlaces | None = None
    """Where the call has its operands; None is what its operator says."""
    slots: CacheSlots | None = None
    """Where its history lies in a cache that it writes to, if that shows."""
    unordered: str = ""
    """Why latents of its history may come in another order than that of time; nothing if not."""


@dataclass(frozen=True)
class PoseInput:
    """Describe a graph input that holds world-to-camera matrices `[B, F, 4, 4]`."""

    history_latents: Size
    """Leading cameras, of the context."""
    current_latents: Size
    """Trailing cameras, of the frames being denoised."""
    why: str


def site_of(node: torch.fx.Node) -> AttentionSite | None:
    """Return the fact about an attention call, if there is one."""
    site: AttentionSite | None = node.meta.get(_SITE)
    return site


def set_site(node: torch.fx.Node, site: AttentionSite) -> None:
    """Attach the fact about an attention call."""
    node.meta[_SITE] = site


def move_site(site: AttentionSite, node: torch.fx.Node) -> None:
    """Attach the fact of a call to the call of an operator of ours that has taken its place."""
    set_site(node, replace(site, operands=None))


def rename_site(node: torch.fx.Node, site: AttentionSite, name: str) -> None:
    """Rename an attention call, and what it counts as if it is one of our operators."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lipass":
        set_arguments(node, site=name)
    set_site(node, replace(site, name=name))


def sites(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, AttentionSite]]:
    """List the attention calls of a graph in order."""
    return [(node, node.meta[_SITE]) for node in graph.nodes if _SITE in node.meta]


def set_poses(placeholder: torch.fx.Node, poses: PoseInput) -> None:
    """Attach the fact that a placeholder holds cameras."""
    placeholder.meta[_POSES] = poses


def poses(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, PoseInput]]:
    """List the camera inputs of a graph."""
    return [(node, node.meta[_POSES]) for node in graph.nodes if _POSES in node.meta]
