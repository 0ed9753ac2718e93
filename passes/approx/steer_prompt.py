"""Let a session weigh the prompts of a change against each other, and history from before it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

# The imports register operators that the pass inserts and knows.
import lipass.kernels.distinct
import lipass.kernels.steered
import lipass.kernels.steering_bias  # noqa: F401
from lipass.passes.attention.match import Refusal, attention
from lipass.passes.attention.site import SDPA, AttentionSite, set_site, sites
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.arguments import arguments
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter, refuse_grid, refuse_rewrite

_COLLAPSED = torch.ops.lipass.attend_distinct.default
_STEERED = torch.ops.lipass.attend_steered.default


@dataclass(frozen=True)
class SteerPrompt(Pass):
    """Add to scores, at each attention over a prompt or a history, what the session says.

    ::

        %o = scaled_dot_product_attention(%q, %key, %value)

        %bias: f32[1, 1, 4, n + 320] = lipass.steering_bias(%q, [64, n, 256],
               'text,history,current', 64, 4)
        %o = lipass.attend_steered(%q, %key, %value, %bias)

    While a prompt changes a session passes both texts as one, so that their keys are computed once
    for all chunks of the change. `log(1 - weight)` and `log(weight)` on their scores are attention
    over a mixture of both; at 0 and 1 it is either text alone. The weight goes on from latent to
    latent: each has a row of the bias. `log(alpha)` on older history makes it weigh alpha. All is
    asked for in each call: nothing is compiled anew while it changes. Where nobody says anything,
    nothing is added.

    In `lipass::sparse_attention` it is the `key_bias`. Equal keys at the end of a prompt are not
    merged then. Calls that have a mask, and queries of no known grid, get one row for all, and
    zeros where nobody says anything.

    Keeps: causal calls; queries that hold text too; several runs of text, of which one may be no
    prompt; runs of keys in pieces; merged histories; sites of role other and text, such as those
    with a mask that differs between queries; calls whose gradient is recorded or whose kernel was
    chosen.
    """

    name: ClassVar[str] = "steer-prompt"
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("attend-pieces", "guard-steps", "share-blocks")
    section: ClassVar[str | None] = "steering"
    rewrites_attention: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        for node, site in sites(graph):
            ctx.failing = node
            emit = Emitter(node, ctx)
            found = _asked(node, site, emit)
            if isinstance(found, Refusal):
                ctx.note(site.name, "kept", found.reason)
                continue
            bias = emit(torch.ops.lipass.steering_bias.default, *found)
            _rewrite(node, site, bias, emit)
            told = " and ".join(role for role in ("text", "history") if role in found[2])
            ctx.note(site.name, "rewritten", f"{site.role}, a session weighs its {told}")
            changed = True
        ctx.failing = None
        return changed


_Asked = tuple[Node, list[int | Node], str, int, int]


def _asked(node: Node, site: AttentionSite, emit: Emitter) -> _Asked | Refusal:
    """Return what the session is asked with, see the operator, or say why it is not."""
    roles = ("text",) if site.role == "cross" else tuple(one.role for one in site.segments)
    if why := _unweighed(site, roles):
        return Refusal(why)
    per_latent = 1
    if "history" in roles and site.q_grid is not None:
        if varies := refuse_grid(site):
            return Refusal(varies)
        per_latent = int(site.q_grid[1]) * int(site.q_grid[2])
    if SparseCall.is_one(node):
        call = SparseCall.of(node)
        if call.tile_order:
            return Refusal("its tokens lie in tile order, of which latents are no runs")
        q, keys = call.q, call.k
    elif node.target is _COLLAPSED:
        q, keys = arguments(node)["q"], (arguments(node)["k"],)
    elif not is_call(node, SDPA):
        return Refusal(f"{getattr(node.target, '__name__', node.target)} adds nothing to scores")
    else:
        whole, found = (
            attention(node, mask_apart=True, in_pieces=in_pieces) for in_pieces in (False, True)
        )
        if isinstance(whole, Refusal):
            return whole
        if isinstance(found, Refusal):
            return found
        q, keys = found.q, found.keys if len(found.keys) == len(roles) else whole.keys
    if not SparseCall.is_one(node) and (chosen := refuse_rewrite(node)):
        return Refusal(chosen)
    tokens = _tokens(site, keys, emit)
    if tokens is None:
        return Refusal("several of its runs of keys vary in length, and are joined out of sight")
    return q, tokens, ",".join(roles), per_latent, _latents(node, site)


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _given(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by the names that `scaled_dot_product_attention` has."""
    if node.target is _COLLAPSED:
        given = arguments(node)
        same = dict(zip(_NAMES, (given["q"], given["k"], given["v"]), strict=False))
        return same | {"scale": given["scale"]}
    return dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)


def _latents(node: Node, site: AttentionSite) -> int:
    """Return how many latents of the queries get a row each; 1 gives all queries one."""
    if site.q_grid is None or not isinstance(site.q_grid[0], int):
        return 1
    if SparseCall.is_one(node):
        call = SparseCall.of(node)
        alone = call.key_bias is None and call.latent_mask is None
    else:
        given = _given(node)
        alone = all(not given.get(name) for name in ("attn_mask", "dropout_p", "enable_gqa"))
    return site.q_grid[0] if alone else 1


def _unweighed(site: AttentionSite, roles: tuple[str, ...]) -> str:
    """Say why nothing at a site is to be weighed."""
    if site.role in ("other", "text"):
        return f"{site.role}: {site.reason}"
    if site.latents_first is not None:
        return "its queries hold text too"
    if roles.count("text") > 1:
        return f"it has {roles.count('text')} runs of text, and one of them is the prompt"
    if any(one.pieces not in ((), (i,)) for i, one in enumerate(site.segments)):
        return "its runs of keys lie in pieces"
    if "text" not in roles and "history" not in roles:
        return f"{site.role} without a prompt or a history"
    return ""


def _tokens(site: AttentionSite, keys: tuple[Node, ...], emit: Emitter) -> list[int | Node] | None:
    """Return the tokens of each run; of keys that are joined one may vary, and is what is left."""
    if len(keys) == max(len(site.segments), 1):
        return [emit.size(value(key).shape[2], key, 2) for key in keys]
    sizes = [one.tokens for one in site.segments]
    varying = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(keys) != 1 or len(varying) > 1:
        return None
    told: list[int | Node] = [size if isinstance(size, int) else 0 for size in sizes]
    for i in varying:
        others = sum(size for size in sizes if isinstance(size, int))
        every = emit.size(value(keys[0]).shape[2], keys[0], 2)
        told[i] = every - others if isinstance(every, int) else emit(operator.sub, every, others)
    return told


def _rewrite(node: Node, site: AttentionSite, bias: Node, emit: Emitter) -> None:
    """Add rows `[1, 1, T or 1, Lk]` to the scores of a call."""
    by_latent = not known_true(value(bias).shape[2] == 1)
    if SparseCall.is_one(node):
        call = SparseCall.of(node)
        if by_latent:
            replace(call, key_bias=bias).write(node)
            return
        row = emit.method("float", emit.method("squeeze", bias, 2))
        if (own := call.key_bias) is not None:
            own = own if value(own).dim() == 3 else emit.method("unsqueeze", own, 1)
            row = emit(operator.add, row, own)
        replace(call, key_bias=row).write(node)
        return
    given = _given(node)
    q, k, v, scale = (given.get(name) for name in ("query", "key", "value", "scale"))
    if by_latent:
        made = emit(_STEERED, q, k, v, bias, scale)
    elif node.target is _COLLAPSED:
        made = emit(SDPA, q, k, v, attn_mask=bias, scale=scale)
    else:
        mask = node.kwargs.get("attn_mask")
        if isinstance(mask, Node) and value(mask).dtype == torch.bool:
            bias = emit(torch.where, mask, bias, -math.inf)
        elif isinstance(mask, Node):
            bias = emit(operator.add, mask, bias)
        made = emit.like(node, node.args, dict(node.kwargs) | {"attn_mask": bias})
    set_site(made, site)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
