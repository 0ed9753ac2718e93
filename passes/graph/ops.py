"""Know what an operator is, in each of its forms: function, method, `operator.*`, overload.

One table for all passes. What torch says itself is asked, not written down: the operators that a
call runs (see `primitives`), their tags and schemas, and the formulas of its FLOP counter. The
tables here hold the rest: what moves or keeps axes, and where tags are missing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from lipass.passes.graph.collectives import is_collective
from lipass.passes.graph.compat import hint, value
from lipass.passes.graph.primitives import IN_PLACE, Primitive, bodies, overloads, trace
from lipass.passes.graph.writes import mutates, storage

# Operators of aten by what they do to the axes and the numbers of one tensor.
_COPIES = {"alias", "clone", "detach", "lift_fresh"}
_CASTS = {"_to_copy"}
_RESHAPES = {"_reshape_alias", "_unsafe_view", "squeeze", "unsqueeze", "view"}
_MOVES = {"permute", "t", "transpose"}
_EXPANSIONS = {"expand"}
# Pointwise, but not tagged so.
_POINTWISE = {"fill", "hardswish", "log_sigmoid_forward", "masked_fill"}
# By the names that people write; what these run differs from device to device.
_NORMS = {"layer_norm", "rms_norm"}
_LEARNED = {"batch_norm", "embedding", "group_norm", "linear"}
_MASKS = {"masked_fill", "masked_scatter", "tril", "triu", "where"}
_ACTIVATIONS = {"elu", "exp", "exp2", "gelu", "relu", "sigmoid", "silu", "softplus", "tanh"}
# Two names for one operator.
_SAME = {
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "floordiv": "floor_divide",
    "multiply": "mul",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
}


def name_of(node: Node) -> str:
    """Return the name of an operator of torch, without the `_` of its form in place.

    Nothing for operators of other libraries, which may mean anything by a name.
    """
    target: Any = node.target
    if node.op == "call_method":
        found = str(target).removeprefix("__")
    elif node.op != "call_function":
        return ""
    elif isinstance(target, torch._ops.OpOverload):
        found = target.overloadpacket.__name__ if target.namespace == "aten" else ""
    elif isinstance(target, torch._ops.OpOverloadPacket):
        found = target.__name__ if target._qualified_op_name.startswith("aten::") else ""
    elif target in IN_PLACE:
        found = target.__name__.removeprefix("i")  # `operator.iadd`
    else:
        module = getattr(target, "__module__", None) or ""
        own = module in ("_operator", "builtins") or module.partition(".")[0] == "torch"
        found = getattr(target, "__name__", "") if own else ""
    found = found.removeprefix("special_").rstrip("_")
    return _SAME.get(found, found)


def argument(node: Node, position: int, key: str, default: Any = None) -> Any:
    """Return an argument of a function or a method; methods count their tensor as the first."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(key, default)


def is_copy(node: Node) -> bool:
    """Whether a call gives all numbers of its tensor, in its axes and its dtype."""
    return is_cast(node) and value(node).dtype == value(node.all_input_nodes[0]).dtype


def is_cast(node: Node) -> bool:
    """Whether a call gives all numbers of its tensor in its axes, in whatever dtype."""
    if not _does(node, _COPIES | _CASTS):
        return False
    same: bool = value(node).device == value(node.all_input_nodes[0]).device
    return same


def is_reshape(node: Node) -> bool:
    """Whether a call gives all numbers of its tensor in their order, in other axes."""
    return _does(node, _COPIES | _RESHAPES) and _ran(node, _RESHAPES)


def is_expansion(node: Node) -> bool:
    """Whether a call repeats its tensor along axes of size 1, without a copy."""
    return _does(node, _COPIES | _EXPANSIONS) and _ran(node, _EXPANSIONS)


def is_other_look(node: Node) -> bool:
    """Whether a call gives the numbers of one tensor, in whatever axes and dtype."""
    return _does(node, _COPIES | _CASTS | _RESHAPES | _MOVES | _EXPANSIONS)


def is_view(node: Node) -> bool:
    """Whether a call costs next to nothing: it looks at its first argument in another way."""
    if not node.op.startswith("call") or not node.all_input_nodes or mutates(node):
        return False
    if is_reshape(node):
        return True
    leaves = _tensors(value(node))
    given = {storage(leaf) for leaf in _tensors(value(node.all_input_nodes[0]))}
    return bool(leaves) and all(storage(leaf) in given for leaf in leaves)


def moved_axes(node: Node) -> tuple[int, ...] | None:
    """Return `axes` such that a node is `above.permute(axes)`, or None if it is anything else."""
    if not (_does(node, _COPIES | _MOVES) and _ran(node, _MOVES)):
        return None
    above = value(node.all_input_nodes[0])
    axes = list(range(above.dim()))
    for one in _primitives(node):
        axes = _moved(axes, one)
    return tuple(axes)


def _moved(axes: list[int], one: Primitive) -> list[int]:
    kind = _base(one)
    if kind == "permute":
        return [axes[int(axis)] for axis in one.args["dims"]]
    if kind not in _MOVES or len(axes) < 2:
        return axes
    first, second = (0, 1) if kind == "t" else (one.args["dim0"], one.args["dim1"])
    axes = list(axes)
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def is_pointwise(node: Node, *, in_place: bool = False) -> bool:
    """Whether each number of the result is of the numbers in its place, up to broadcasting.

    Args:
        node: the call.
        in_place: ask it of a call that writes to its first tensor, the whole of it.
    """
    if draws(node) or mutates(node) != in_place or not isinstance(value(node), torch.Tensor):
        return False
    if in_place and trace(node) is not None and trace(node).written != {0}:
        return False
    found = _primitives(node)
    if not found:
        return is_copy(node)
    return all(_is_pointwise(one) for one in found)


def _is_pointwise(one: Primitive) -> bool:
    tagged = torch.Tag.pointwise in one.overload.tags
    return tagged or _base(one).rstrip("_") in _POINTWISE | _COPIES | _CASTS


def is_mask(node: Node) -> bool:
    """Whether a call puts other numbers in some places of a tensor."""
    return name_of(node) in _MASKS


def is_activation(node: Node) -> bool:
    """Whether a call is what stands in place of a softmax where there is none."""
    return name_of(node) in _ACTIVATIONS


def is_learned(node: Node) -> bool:
    """Whether a call applies weights to features, or normalises them."""
    return name_of(node) in _NORMS | _LEARNED


def is_norm_of_rows(node: Node) -> bool:
    """Whether a call normalises over its trailing axes, each row by itself."""
    return name_of(node) in _NORMS


def flops(node: Node) -> int:
    """Count the FLOPs of the matrix products of a call, at the sizes that are being compiled."""
    return sum(hint(one.flops) for one in _primitives(node))


def is_product(node: Node) -> bool:
    """Whether a call computes matrix products."""
    return any(_has_formula(one) for one in _primitives(node))


def _has_formula(one: Primitive) -> bool:
    return one.overload.overloadpacket in flop_registry


def reads(node: Node) -> list[Node]:
    """List the inputs whose numbers a call needs, and not only their shape or dtype."""
    found = trace(node)
    if found is None:
        return list(node.all_input_nodes)
    return [above for at, above in enumerate(node.all_input_nodes) if at in found.needs]


def draws(node: Node) -> bool:
    """Whether a call draws random numbers, in itself or in a body that it calls."""
    inner = bodies(node)
    if any(draws(one) for body in inner for one in body.graph.nodes):
        return True
    if not node.op.startswith("call") or inner:
        return False
    found = trace(node)
    if found is not None:
        return any(_draws(one) for one in found.ran)
    packet = getattr(torch.ops.aten, name_of(node) or "nothing", None)
    named = [getattr(packet, one) for one in packet.overloads()] if packet else []
    return any(_may_draw(one, {}) for one in overloads(node) or named) or _is_opaque(node)


def _draws(one: Primitive) -> bool:
    return _may_draw(one.overload, one.args)


def _may_draw(overload: Any, given: dict[str, Any]) -> bool:
    arguments = {one.name: one for one in overload._schema.arguments}
    drops = {"dropout_p", "dropout"} & arguments.keys()
    generators = any("Generator" in str(one.type) for one in arguments.values())
    if not (torch.Tag.nondeterministic_seeded in overload.tags or drops or generators):
        return False
    # A dropout of nothing, or one that is only on while training.
    off = any(given.get(key) == 0 and given.get(key) is not None for key in drops)
    return not (off or given.get("train") is False or given.get("training") is False)


def _is_opaque(node: Node) -> bool:
    """Whether a call is of a function of Python about which nothing is to be found out."""
    if node.op != "call_function" or hasattr(torch.ops.aten, name_of(node) or "nothing"):
        return False
    module = getattr(node.target, "__module__", None) or ""
    own = module.startswith(("torch._", "torch.autograd", "torch.amp", "torch.nn.attention"))
    sizes = module == "torch" and getattr(node.target, "__name__", "").startswith("sym_")
    return hasattr(node.target, "__code__") and not (own or sizes) and bool(node.all_input_nodes)


def has_effect(node: Node) -> bool:
    """Whether a node does something even if nobody reads its value.

    What gives no tensor and no number is called for what it does: it enters a vmap, chooses a
    kernel of attention, sets a dtype. What draws changes what is drawn next. What exchanges
    tensors with other processes is waited for by them.
    """
    if not node.op.startswith("call"):
        return node.is_impure()
    if gives_nothing(node) or node.is_impure() or mutates(node):
        return True
    return draws(node) or is_collective(node)


def gives_nothing(node: Node) -> bool:
    """Whether a call gives no tensor and no number."""
    leaves = pytree.tree_leaves(value(node))
    return not any(isinstance(leaf, _VALUES) for leaf in leaves)


_VALUES = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def _primitives(node: Node) -> tuple[Primitive, ...]:
    found = trace(node)
    return () if found is None else found.ran


def _base(one: Primitive) -> str:
    return one.overload.overloadpacket.__name__ if one.overload.namespace == "aten" else ""


def _ran(node: Node, names: set[str]) -> bool:
    return any(_base(one) in names for one in _primitives(node))


def _does(node: Node, names: set[str]) -> bool:
    """Whether a call makes one tensor of one tensor, by nothing but some operators."""
    above = node.all_input_nodes[:1]
    if not all(isinstance(value(one), torch.Tensor) for one in (node, *above)):
        return False
    found = trace(node)
    if found is None or found.written or not all(_base(one) in names for one in found.ran):
        return False
    return found.needs == {0}


def _tensors(part: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]
