"""Give attention, concatenation and views one spelling each, for later passes to match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes.attention.join_late import join_late
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.multihead import spell_multihead
from lipass.passes.attention.one_spelling import other_spelling, spell_as_sdpa, wrong
from lipass.passes.attention.site import SDPA, AttentionSite, set_site
from lipass.passes.attention.softmax_attention import Spelled
from lipass.passes.attention.unread_rows import drop_unread_rows
from lipass.passes.core import Numerics, Pass, PassContext, PassError
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.dead_code import erase_dead
from lipass.passes.graph.einops_calls import spell_einops
from lipass.passes.graph.equivalence import Incomparable
from lipass.passes.graph.modes import place_switches
from lipass.passes.graph.names import call_line, module_path
from lipass.passes.graph.ops import is_other_look, name_of
from lipass.passes.graph.transforms import drop_unread
from lipass.passes.graph.writes import storage, writes_between

_SDPA_NAMES = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)
_SDPA_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite spellings; aliasing and mutation stay as they are, and values but for rounding.

    Attention takes q, k, v by position and only what differs from the default by keyword::

        %o = scaled_dot_product_attention(query=%q, key=%k, value=%v, dropout_p=0.0)
        %o = scaled_dot_product_attention(%q, %k, %v)

    Concatenation has a non-negative dim by position and is flat, without empty pieces::

        %kv = cat([%hist, %cur], dim=-2);  %k = cat([%text, %kv], dim=2)
        %k = cat([%text, %hist, %cur], 2)

    Attention written by hand, of flash_attn and of FlexAttention without masks becomes SDPA::

        %p = softmax(%q @ %k.mT * 0.125, -1);  %o = %p @ %v
        %o = scaled_dot_product_attention(%q, %k, %v)

    So do its masks: numbers that hide keys, and what is added to scores. Queries that see no key
    stay what softmax makes of them, NaN or the mean of all values, for which SDPA gives 0::

        %s = masked_fill(%q @ %k.mT, %hidden, -inf);  %o = softmax(%s, -1) @ %v

        %rows = any(%shown, -1, True)
        %a = scaled_dot_product_attention(%q, %k, %v, attn_mask=%shown, scale=1.0)
        %o = where(%rows, %a, nan)

    Calls of einops that Dynamo keeps whole become the calls of torch that they make::

        %q = rearrange(%q, 'B L (H D) -> B L H D', H=16)
        %q = reshape(%q, b, l, 16, 128)

    So does `torch.nn.MultiheadAttention`, which Dynamo keeps whole, with its projections beside it
    (`passes/attention/multihead.py`).

    Queries that are joined with others whose rows nobody reads attend alone
    (`passes/attention/unread_rows.py`).

    Keys and values that are moved, cast or stacked behind their concatenation are concatenated
    last. `view` becomes `reshape` (the same view where `view` is valid), and a reshape, flatten,
    contiguous, to, expand, permute or transpose that returns its input is removed.

    Keeps: `view(dtype)`; a no-op whose result is a graph output; an inner concatenation with a
    write between it and the outer one; attention that is more than a plain softmax
    over its keys, or whose SDPA call gives another result on small inputs. Such attention becomes
    a site of role `other` with the reason.
    """

    name: ClassVar[str] = "canonicalize"
    numerics: ClassVar[Numerics] = Numerics.REORDERED

    verify: bool = True
    """Compare attention in another spelling with its SDPA call before it is rewritten."""
    strict: bool = False
    """Raise where that comparison fails."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        verify = options.get("verify", "first") == "first"
        return {"verify": verify, "strict": verify and options.get("strict", False)}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        place_switches(graph)
        for node in ctx.visit(list(graph.nodes)):
            changed |= spell_einops(node, ctx) or self._spell_multihead(node, ctx)
        for node in ctx.visit(list(graph.nodes)):
            changed |= _spell_attention(node) or _spell_cat(node) or _spell_view(node)
            changed |= _drop_nothing(node)
        for node in ctx.visit(list(graph.nodes)):
            changed |= self._spell_as_sdpa(node, ctx)
        if changed:
            # what was replaced still reads the keys, and keys with other readers are left alone
            erase_dead(graph)
            # FlexAttention makes a mask under `vmap`, which nobody reads any more
            while drop_unread(graph):
                erase_dead(graph)
        for change in (drop_unread_rows, join_late):
            for node in ctx.visit([node for node in graph.nodes if is_call(node, SDPA)]):
                changed |= change(node, ctx)
        return changed

    def _spell_multihead(self, node: Node, ctx: PassContext) -> bool:
        place = module_path(node) or "attention"
        found = spell_multihead(node, ctx)
        if isinstance(found, Refusal):
            return _keep(node, place, found.reason, ctx)
        if found:
            ctx.note(place, "rewritten", "the whole call is projections and attention")
        return found

    def _spell_as_sdpa(self, node: Node, ctx: PassContext) -> bool:
        found = other_spelling(node)
        if found is None:
            return False
        place = module_path(node) or "attention"
        why = found.reason if isinstance(found, Refusal) else self._wrong(found, place)
        if why:
            return _keep(node, place, why, ctx)
        assert isinstance(found, Spelled)
        spell_as_sdpa(found, ctx)
        ctx.note(place, "rewritten", f"{found.how} is scaled_dot_product_attention")
        return True

    def _wrong(self, spelled: Spelled, place: str) -> str:
        """Say how the SDPA call differs from what it is to replace, or nothing."""
        if not self.verify:
            return ""
        try:
            why = wrong(spelled)
        except Incomparable as error:
            # an operator of a library is what its name says, and may need a GPU to run
            why = None if spelled.opaque else str(error)
        if why and self.strict:
            raise PassError(f"strict: {place} must equal its SDPA call, but {why}; report this")
        return f"its SDPA call is not equal: {why}" if why else ""


def _keep(node: Node, place: str, why: str, ctx: PassContext) -> bool:
    """Leave attention as it is, as a site of role `other` with the reason."""
    set_site(node, AttentionSite(place, call_line(node), "other", None, (), 1.0, why))
    ctx.note(place, "kept", why)
    return False


def _spell_attention(node: Node) -> bool:
    if node.op != "call_function" or name_of(node) != SDPA.__name__:
        return False
    given = {**dict(zip(_SDPA_NAMES, node.args, strict=False)), **node.kwargs}
    args = tuple(given.pop(key) for key in _SDPA_NAMES[:3])
    kwargs = {k: v for k, v in given.items() if v is None or v != _SDPA_DEFAULTS[k]}
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if (node.target, node.args, node.kwargs) == (SDPA, args, kwargs):
        return False
    node.target, node.args, node.kwargs = SDPA, args, kwargs
    return True


def _spell_cat(node: Node) -> bool:
    if node.op != "call_function" or name_of(node) != "cat":
        return False
    pieces = node.args[0] if node.args else node.kwargs["tensors"]
    dim = (
        node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    )
    if "out" in node.kwargs or not isinstance(pieces, (list, tuple)) or not isinstance(dim, int):
        return False
    dim %= value(node).dim()
    flat: list[Any] = []
    for piece in pieces:
        flat.extend(piece.args[0] if _is_inner_cat(piece, node, dim) else [piece])
    flat = _without_empty(flat, node, dim)
    if node.target is torch.cat and node.args == (flat, dim) and not node.kwargs:
        return False
    node.target, node.args, node.kwargs = torch.cat, (flat, dim), {}
    return True


def _without_empty(pieces: list[Any], cat: Node, dim: int) -> list[Any]:
    """Leave out pieces without a single element, such as a cache that is still empty.

    A piece of one axis and no element joins anything; the result has the dtype of all pieces.
    """
    full = [piece for piece in pieces if not _is_empty(piece, dim)]
    dtypes = {value(piece).dtype for piece in full}
    return full if dtypes == {value(cat).dtype} else pieces


def _is_empty(piece: object, dim: int) -> bool:
    tensor = value(piece)
    if not isinstance(tensor, torch.Tensor):
        return False
    return known_true(tensor.shape[0 if tensor.dim() == 1 else dim] == 0)


def _is_inner_cat(piece: object, outer: Node, dim: int) -> bool:
    """Whether a concatenation can be part of the outer one, which reads the pieces later."""
    if not isinstance(piece, Node) or not is_call(piece, torch.cat):
        return False
    if piece.args[1:] != (dim,):
        return False
    return next(writes_between(piece, outer), None) is None


def _spell_view(node: Node) -> bool:
    if not is_call(node, "view") or not isinstance(value(node), torch.Tensor):
        return False
    if any(isinstance(arg, torch.dtype) for arg in node.args) or node.kwargs:
        return False
    node.target = "reshape"
    return True


def _drop_nothing(node: Node) -> bool:
    if any(user.op == "output" for user in node.users) or not is_other_look(node):
        return False
    source = node.all_input_nodes[0]
    if not _same_tensor(value(node), value(source)):
        return False
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def _same_tensor(a: object, b: object) -> bool:
    """Whether two fake tensors are the same view of the same memory."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    if a.dim() != b.dim() or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.requires_grad != b.requires_grad:  # `detach` ends what is differentiated
        return False
    if storage(a) != storage(b):
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(known_true(x == y) for x, y in [*pairs, (a.storage_offset(), b.storage_offset())])
