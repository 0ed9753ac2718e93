"""Know which calls are attention: SDPA, and operators of which an adapter has said so.

An adapter plants an operator of its own where a model's attention is nothing that Dynamo can see
through, and declares once which of its arguments are what:

    declare(torch.ops.mylib.attn, OperandPlaces("q", "k", "v", scale="scale"))

`find-attention` then describes its calls by the same rules as SDPA. A pass of the adapter's may
also attach an `AttentionSite` itself; the places that it carries are read first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from lipass.passes.attention.site import SDPA, OperandPlaces, site_of
from lipass.passes.graph.arguments import arguments, overload_of
from lipass.passes.graph.calls import is_call

_PLACES_OF_SDPA = OperandPlaces(0, 1, 2, scale="scale")
_declared: dict[Callable[..., Any], OperandPlaces] = {}


def declare(operator: Callable[..., Any], places: OperandPlaces) -> None:
    """Say that calls of an operator are attention without mask, dropout or order of tokens.

    Args:
        operator: such as `torch.ops.mylib.attn`, or a function that Dynamo leaves in the graph. It
            takes q, k and v as `[B, H, L, D]`; groups of heads of q may share those of k and v.
        places: which of its arguments are what.

    Raises:
        ValueError: for a name that is no argument of the operator.
    """
    known = _names(operator)
    named = [place for place in places if isinstance(place, str)]
    if unknown := [name for name in named if name not in known]:
        raise ValueError(
            f"places must name arguments of {operator}, got {', '.join(unknown)}; it has "
            f"{', '.join(known)}"
        )
    _declared[overload_of(operator) or operator] = places


def is_attention(node: Node) -> bool:
    """Whether a node is a call of SDPA or of an operator that is declared."""
    return places_of(node) is not None


def places_of(node: Node) -> OperandPlaces | None:
    """Return where a call has its operands: what its fact carries, or what its operator says."""
    if node.op != "call_function":
        return None
    site = site_of(node)
    if site is not None and site.operands is not None:
        return site.operands
    if is_call(node, SDPA):
        return _PLACES_OF_SDPA
    target: Any = node.target
    return _declared.get(overload_of(target) or target)


def argument(node: Node, place: int | str) -> Any:
    """Return the argument of a call at a place; None where it is left out."""
    if isinstance(place, int):
        return node.args[place] if place < len(node.args) else None
    if overload_of(node.target) is not None:
        return arguments(node).get(place)
    if place in node.kwargs:
        return node.kwargs[place]
    names = _names(node.target)
    return argument(node, names.index(place)) if place in names else None


def _names(operator: Any) -> list[str]:
    """Return the names of the arguments of an operator; builtins of torch do not tell."""
    if (overload := overload_of(operator)) is not None:
        return [one.name for one in overload._schema.arguments]
    try:
        return list(inspect.signature(operator).parameters)
    except ValueError:
        return []
