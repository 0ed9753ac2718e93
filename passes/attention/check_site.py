"""Compare an attention site with its block-sparse call at budget 1.0, which has to equal it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from lipass.kernels import registry
from lipass.passes.attention.match import Operands
from lipass.passes.attention.site import AttentionSite, Grid, KeySegment
from lipass.passes.attention.sparse_call import replace_attention
from lipass.passes.core import PassContext
from lipass.passes.graph.compat import constant, value
from lipass.passes.graph.equivalence import Incomparable, Shape, between, difference
from lipass.passes.graph.region import region_of

# of the copy on which the call is tried
_BATCH, _HEADS, _FEATURES, _TEXT = 2, 2, 4, 5
_GRIDS: dict[str, Grid] = {"current": (2, 3, 2), "history": (3, 3, 2)}
_NAME = "comparison while compiling"


def wrong(call: Node, operands: Operands, site: AttentionSite) -> str | None:
    """Say how `lipass::sparse_attention` at budget 1.0 differs from a call, or return None."""
    segments = tuple(_small(segment) for segment in site.segments)
    small = replace(site, name=_NAME, q_grid=_GRIDS["current"], segments=segments)

    tile = (1, 2, 2) if site.latent_mask else (2, 2, 2)

    def rewrite(root: Node, copies: Mapping[Node, Node], ctx: PassContext) -> None:
        parts = operands.map(copies)
        replace_attention(
            root, small, parts, ctx, tile=tile, budget=1.0, sink_latents=0, keep_frames=None
        )

    shapes = _shapes(operands, small)
    if shapes is None:
        return "one tensor is two of its pieces"
    try:
        return difference(call, shapes, rewrite)
    except Incomparable as error:
        return str(error)
    finally:
        # what was tried here is no call of the model
        registry._sites.pop(_NAME, None)


def form(call: Node, operands: Operands, site: AttentionSite) -> object:
    """Return what a comparison depends on: sites of equal form have equal results."""
    inside = between(call, set(operands.tensors()))
    nodes = [node for node in call.graph.nodes if node in inside]
    region = region_of([node for node in nodes if node not in operands.tensors()])
    pieces = tuple(region.inputs.index(x) for x in operands.tensors() if x in region.inputs)
    roles = tuple(segment.role for segment in site.segments)
    kind = (site.role, site.latents_first, operands.mask is None, site.latent_mask)
    return str((region.form, pieces, roles, kind, site.scale, operands.groups))


def _latent_mask(mask: Node, site: AttentionSite) -> torch.Tensor:
    """Make a mask of small sizes that shows each latent itself and those in front of it."""
    assert site.q_grid is not None
    text = sum(int(one.tokens) for one in site.segments if one.role == "text")
    latents = [int(one.grid[0]) for one in site.segments if one.role != "text"]
    rows = torch.arange(sum(latents))
    shown = rows[-int(site.q_grid[0]) :, None] >= rows
    for axis in (0, 1):
        shown = shown.repeat_interleave(int(site.q_grid[1] * site.q_grid[2]), axis)
    shown = torch.nn.functional.pad(shown, (text, 0), value=True)
    shown = shown.expand(*(1,) * (value(mask).dim() - 2), -1, -1)
    if value(mask).dtype == torch.bool:
        return shown
    return torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)


def _small(segment: KeySegment) -> KeySegment:
    if segment.role == "text":
        return replace(segment, tokens=_TEXT, grid=(1, 1, _TEXT))
    t, y, x = _GRIDS[segment.role]
    return replace(segment, tokens=t * y * x, grid=(t, y, x))


def _shapes(operands: Operands, site: AttentionSite) -> dict[Node, Shape | torch.Tensor] | None:
    """Return small shapes of q and of the pieces; None if one tensor would need two."""
    features = constant(value(operands.q).shape[3])
    features = features if isinstance(features, int) else _FEATURES
    t, y, x = _GRIDS["current"]
    tokens = [int(segment.tokens) for segment in site.segments]
    heads = _HEADS * operands.groups
    shapes: dict[Node, Shape | torch.Tensor] = {
        operands.q: (_BATCH, heads, int(t * y * x), features)
    }
    if operands.mask is not None and site.latent_mask:
        shapes[operands.mask] = _latent_mask(operands.mask, site)
    elif operands.mask is not None:
        given = value(operands.mask).shape
        batch, rows = (
            1 if one == 1 else n for one, n in zip(given, (_BATCH, heads), strict=False)
        )
        shapes[operands.mask] = (batch, rows, 1, sum(tokens))
    if site.latents_first is not None:
        tokens = [sum(tokens)]
        shapes[operands.q] = (_BATCH, heads, *tokens, features)
    for pieces in (operands.keys, operands.values):
        for piece, length in zip(pieces, tokens, strict=True):
            shape = (_BATCH, _HEADS, length, features)
            if shapes.setdefault(piece, shape) != shape:
                return None
    return shapes
