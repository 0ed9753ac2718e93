"""Read masks that say which latents see which: a causal order of frames or chunks, a window."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention import match, padding_mask
from lipass.passes.attention.match import Operands
from lipass.passes.attention.run_shapes import ALL
from lipass.passes.attention.runs import is_run, runs_of
from lipass.passes.attention.site import SDPA, AttentionSite
from lipass.passes.core import PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, known_true, value
from lipass.passes.graph.emit import emit_behind
from lipass.passes.graph.ops import argument, is_other_look, moved_axes, name_of
from lipass.passes.graph.writes import is_rewritten, mutates, shares_memory, writers_of

BY_LATENTS = "a mask says which latents see which"
_REPEATS = {"repeat", "repeat_interleave", "tile", "getitem", "tril", "triu"}
_ONES = {"ones", "new_ones", "ones_like"}
_ZEROS = {"zeros", "new_zeros", "zeros_like"}
_FILLED = {"full": 1, "new_full": 2, "full_like": 1}


def whole(call: Node) -> Operands | None:
    """Match a call with a mask of a row for each query, its keys in pieces."""
    mask = call.kwargs.get("attn_mask") if is_call(call, SDPA) else None
    if not isinstance(mask, Node) or not isinstance(value(mask), torch.Tensor):
        return None
    if value(mask).dim() not in (2, 3, 4) or padding_mask.same_for_all(mask):
        return None
    found = match.attention(call, mask_apart=True)
    if not isinstance(found, Operands):
        return None
    sizes = (value(found.q).shape[2], value(call.args[1]).shape[2])
    rows, columns = zip(value(mask).shape[-2:], sizes, strict=True)
    every = known_true(rows[0] == rows[1]) and known_true(columns[0] == columns[1])
    return replace(found, mask=mask) if every else None


def masked(call: Node, mask: Node, site: AttentionSite) -> AttentionSite:
    """Add to a site over latents what its mask says of them, or why that is not known."""
    if why := why_not(call, mask, site):
        return replace(site, role="other", segments=(), reason=why)
    return replace(site, latent_mask=True, reason=f"{site.reason}, and {BY_LATENTS}")


def why_not(call: Node, mask: Node, site: AttentionSite) -> str:
    """Say why a mask of a call over latents may differ within a latent, or return nothing."""
    shape = value(mask).shape
    shown = f"its mask [{', '.join(map(str, shape))}]"
    text = _text(site)
    if text and not isinstance(text, int):
        return f"{shown} covers text of a length that varies"
    of_latents = _behind_text(mask, text) if text else mask
    if of_latents is None:
        return f"{shown} covers text too, and nothing shows that every query sees it"
    places = [i for segment in site.segments for i in segment.pieces]
    if places != sorted(places):
        return f"{shown} covers keys of q in front of others"
    if any(write > call for write in writers_of(mask)):
        return f"{shown} is written to behind it"
    runs = runs_of(of_latents).runs
    if len(shape) > 2 and not (known_true(shape[-3] == 1) or runs_of(mask).runs[-3] is ALL):
        return f"{shown} may differ between heads"
    per_latent = _per_latent(site)
    for axis, what in ((-2, "queries"), (-1, "keys")):
        if not is_run(per_latent, runs[axis]):
            return (
                f"{shown} may differ between queries, and nothing shows that it is one for all "
                f"{what} of a latent"
            )
    if value(mask).dtype != torch.bool and not _hides(of_latents):
        return f"{shown} adds to its scores other numbers than 0 and -inf"
    return ""


def latents_of(mask: Node, site: AttentionSite, ctx: PassContext) -> Node:
    """Emit which latents see which, `[B or 1, Tq, Tk]` bool, once behind the mask.

    It belongs to what makes the mask, so that no layer takes that of all tokens as an input.
    """
    one = slice(None, None, int(_per_latent(site)))
    rank = value(mask).dim()
    front = {2: (None,), 3: (slice(0, 1),), 4: (slice(None), 0)}[rank]
    index = (*front, one, slice(_text(site) or None, None, one.step))
    made = emit_behind(mask, ctx, operator.getitem, index)
    return made if value(mask).dtype == torch.bool else emit_behind(made, ctx, operator.eq, 0)


def _text(site: AttentionSite) -> Size:
    """Return how many keys of text there are."""
    first = site.segments[0]
    return first.tokens if first.role == "text" else 0


def _behind_text(mask: Node, text: Size) -> Node | None:
    """Return the columns of a mask behind those of a text that every query sees, if it does."""
    node, columns, shows = mask, value(mask).shape[-1], value(mask).dtype == torch.bool
    while name_of(node) == "logical_not" or (is_other_look(node) and moved_axes(node) is None):
        above = node.all_input_nodes[0]
        if not known_true(value(above).shape[-1] == columns):
            break
        if name_of(node) == "logical_not":
            if value(above).dtype != torch.bool:
                break
            shows = not shows
        if is_rewritten(node):
            return None
        node = above
    if is_rewritten(node):
        return None
    seen = _ONES if shows else _ZEROS
    if name_of(node) == "pad":
        given, fill = argument(node, 1, "pad"), argument(node, 3, "value")
        fits = list(given[:2]) == [text, 0] and not any(given[2:])
        shown = bool(fill) == shows
        return node.all_input_nodes[0] if fits and shown else None
    pieces: Any = argument(node, 0, "tensors")
    if name_of(node) != "cat" or argument(node, 1, "dim", 0) not in (-1, value(node).dim() - 1):
        return None
    if len(pieces) != 2 or name_of(pieces[0]) not in seen or writers_of(pieces[0]):
        return None
    return pieces[1] if known_true(value(pieces[0]).shape[-1] == text) else None


def _per_latent(site: AttentionSite) -> Size:
    assert site.q_grid is not None
    return site.q_grid[1] * site.q_grid[2]


def _hides(node: Any) -> bool:
    """Whether a mask of floats is 0 where a key is seen and -inf where it is hidden."""
    if not isinstance(node, Node):
        return isinstance(node, (int, float)) and node in (0, -math.inf)
    name = name_of(node)
    if mutates(node):
        return name in ("masked_fill", "fill") and _hides(node.all_input_nodes[0])
    sources = node.all_input_nodes
    if name in _FILLED:
        made = _hides(argument(node, _FILLED[name], "fill_value"))
    elif name in _ZEROS:
        made = True
    elif name == "masked_fill":
        made = _hides(node.args[0]) and _hides(argument(node, 2, "value"))
    elif name == "where":
        made = len(node.args) == 3 and all(map(_hides, node.args[1:]))
    elif is_other_look(node) or name in _REPEATS:
        made = bool(sources) and _hides(sources[0])
    else:
        made = False
    if not made or any(shares_memory(node, one) for one in sources):
        return made
    # every write puts one of the two numbers in some places
    return all(
        name_of(write) in ("masked_fill", "fill") and _hides(write.args[-1])
        for write in writers_of(node)
    )
