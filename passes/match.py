"""Recognise nodes in canonical form, or say in a `Refusal` why they are something else."""

from __future__ import annotations

import functools
import heapq
import inspect
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch.fx import Node
from torch.fx.node import map_arg

from lipass.passes.compat import Size, guard, is_parameter, known_true, value, without_vmap
from lipass.passes.site import pieces_of

SDPA = torch.nn.functional.scaled_dot_product_attention

_WRITES = {
    operator.setitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv")),
    *(getattr(operator, f"i{name}") for name in ("mod", "pow", "matmul", "and", "or", "xor")),
}
_SAME_VALUES = {"contiguous", "detach", "clone", "to"}


@dataclass(frozen=True)
class Refusal:
    """Say why a matcher does not match."""

    reason: str


@dataclass(frozen=True)
class Operands:
    """Hold the operands of an attention call; `keys[i]` and `values[i]` are one segment."""

    q: Node
    keys: tuple[Node, ...]
    values: tuple[Node, ...]
    scale: float
    groups: int = 1
    """Heads of q that share one head of k and v."""

    def tensors(self) -> tuple[Node, ...]:
        """List q and all pieces; a node may come more than once."""
        return (self.q, *self.keys, *self.values)

    def map(self, nodes: Mapping[Node, Node]) -> Operands:
        """Return the same operands in a copy of the graph."""
        keys, values = (tuple(nodes[x] for x in part) for part in (self.keys, self.values))
        return Operands(nodes[self.q], keys, values, self.scale, self.groups)


def is_call(node: object, target: object) -> bool:
    """Whether a node calls a function, or a method if `target` is a string."""
    op = "call_method" if isinstance(target, str) else "call_function"
    return isinstance(node, Node) and node.op == op and node.target == target


def attention(node: Node) -> Operands | Refusal:
    """Match a canonical attention call that is a plain softmax over all keys."""
    if "attn_mask" in node.kwargs:
        return Refusal("it has a mask")
    if node.kwargs.get("dropout_p", 0.0) != 0.0:
        return Refusal(f"dropout is {node.kwargs['dropout_p']}")
    if node.kwargs.get("is_causal", False) is not False:
        return Refusal("it is causal")
    q, k, v = node.args[:3]
    if not (isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)):
        return Refusal("its operands are not tensors of the graph")
    ranks = [value(x).dim() for x in (q, k, v)]
    if ranks != [4, 4, 4]:
        return Refusal(f"q, k, v must be [B, H, L, D], got ranks {ranks}")
    if not known_true(value(q).shape[3] == value(v).shape[3]):
        return Refusal("head dims of q and v differ")
    groups = _groups(value(q), value(k)) if node.kwargs.get("enable_gqa", False) else 1
    if groups is None:
        return Refusal("heads of q are no whole number of groups of the heads of k (enable_gqa)")
    heads = value(q).shape[1] // groups
    if not (_is_batch(k, value(q).shape[0], heads) and _is_batch(v, value(q).shape[0], heads)):
        return Refusal("q and k differ in batch or heads")
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = value(q).shape[3] ** -0.5
    if not isinstance(scale, float):
        return Refusal("its scale is not a constant")
    keys, values = _pieces(node, 0, k), _pieces(node, 1, v)
    if len(keys) != len(values):
        return Refusal(f"k is made of {len(keys)} pieces and v of {len(values)}")
    for i, (key, val) in enumerate(zip(keys, values, strict=True)):
        # torch does not tie the two sizes to each other when both come from inputs
        if not guard(value(key).shape[2] == value(val).shape[2]):
            return Refusal(f"pieces {i} of k and v differ in length")
    dtypes = {value(x).dtype for x in (node, q, *keys, *values)}
    if len(dtypes) > 1:
        return Refusal(f"its dtypes differ: {', '.join(sorted(map(str, dtypes)))}")
    if pieces_of(node) is None and (
        why := _written_late(node, (k, *keys)) or _written_late(node, (v, *values))
    ):
        return Refusal(why)
    return Operands(q, keys, values, scale, groups)


def _groups(q: torch.Tensor, k: torch.Tensor) -> int | None:
    """Return how many heads of q share one of k; None if they cannot be grouped."""
    q_heads, k_heads = q.shape[1], k.shape[1]
    if not (isinstance(q_heads, int) and isinstance(k_heads, int)) or q_heads % k_heads:
        return None
    return q_heads // k_heads


def _is_batch(tensor: Node, batch: Size, heads: Size) -> bool:
    shape = value(tensor).shape
    return known_true(shape[0] == batch) and known_true(shape[1] == heads)


def _written_late(call: Node, tensors: tuple[Node, ...]) -> str | None:
    """Say what writes to keys between their concatenation and the call, which reads the pieces."""
    memory = {storage(value(tensor)) for tensor in tensors}
    since = same_values(tensors[0])
    for node in writes_between(since, call):
        if memory_written(node) & memory:
            return f"%{node.name} writes to its keys or values in place"
    return None


def writes_between(first: Node, last: Node) -> Iterator[Node]:
    """Iterate over the nodes behind `first` and in front of `last` that write to an input."""
    node = first.next
    while node is not last and node.op != "output":
        if mutates(node):
            yield node
        node = node.next


def storage(tensor: object) -> int | None:
    """Return an identity of the memory of a fake tensor; None for what is no tensor."""
    tensor = without_vmap(tensor)
    return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None


def _pieces(call: Node, index: int, tensor: Node) -> tuple[Node, ...]:
    """Return the pieces of the keys (index 0) or the values of a call."""
    named = pieces_of(call)
    if named is None:
        return _segments(tensor)
    nodes = {node.name: node for node in call.graph.nodes}
    return tuple(nodes[name] for name in named[index])


def _segments(tensor: Node) -> tuple[Node, ...]:
    """Return the inputs of a concatenation along the tokens, or the tensor itself."""
    tensor = same_values(tensor)
    if is_call(tensor, torch.cat) and tensor.args[1] == 2:
        pieces = tensor.args[0]
        if isinstance(pieces, (list, tuple)) and all(isinstance(p, Node) for p in pieces):
            return tuple(pieces)
    return (tensor,)


def is_matrices(node: Node) -> bool:
    """Whether a node is an input `[B, F, 4, 4]` of floats and no parameter."""
    tensor = value(node)
    return (
        node.op == "placeholder"
        and isinstance(tensor, torch.Tensor)
        and tensor.dim() == 4
        and tensor.is_floating_point()
        and known_true(tensor.shape[2] == 4)
        and known_true(tensor.shape[3] == 4)
        and not is_parameter(node)
    )


def same_values(node: Node) -> Node:
    """Walk up through copies and casts to the same dtype and shape."""
    while node.op == "call_method" and node.target in _SAME_VALUES:
        above = node.args[0]
        if not isinstance(above, Node) or value(above).dtype != value(node).dtype:
            break
        node = above
    return node


def upstream(node: Node) -> Iterator[Node]:
    """Iterate over what a node is computed from, nearest first, without crossing an attention."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    heap, seen = [(-order[node], node.name)], {node.name}
    by_name = {n.name: n for n in order}
    while heap:
        current = by_name[heapq.heappop(heap)[1]]
        yield current
        if is_call(current, SDPA):
            continue
        for above in current.all_input_nodes:
            if above.name not in seen:
                seen.add(above.name)
                heapq.heappush(heap, (-order[above], above.name))


def shares_tokens(a: Node, b: Node, tokens: Size) -> bool:
    """Whether two tensors are computed from one computed tensor of that many tokens.

    Tokens are one axis `L` or neighbouring axes whose product is `L`, as in `[B, F, YX, C]`.
    """
    theirs = {n for n in upstream(b) if n.op not in ("placeholder", "get_attr")}
    return any(n in theirs and _has_tokens(n, tokens) for n in upstream(a))


def _has_tokens(node: Node, tokens: Size) -> bool:
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return False
    for start in range(tensor.dim()):
        product: Size = 1
        for size in tensor.shape[start : start + 3]:
            product = product * size
            if known_true(product == tokens):
                return True
    return False


def has_effect(node: Node) -> bool:
    """Whether a node does something even if nobody reads its value, such as entering a vmap."""
    module = getattr(node.target, "__module__", None) or ""
    return node.is_impure() or mutates(node) or module.startswith("torch._functorch")


def mutates(node: Node) -> bool:
    """Whether a node writes to one of its inputs."""
    return bool(_written(node))


def memory_written(node: Node) -> set[int]:
    """Return the identities of the memory that a node writes to; see `storage`."""
    tensors: list[object] = []
    for argument in _written(node):
        map_arg(argument, lambda one: tensors.extend(pytree.tree_leaves(value(one))))
    return {at for tensor in tensors if (at := storage(tensor)) is not None}


def _written(node: Node) -> list[Any]:
    """Return the arguments that a node writes to."""
    if node.op == "call_method":
        return [node.args[0]] if _named_in_place(str(node.target)) else []
    if node.op != "call_function":
        return []
    if getattr(node.target, "__module__", "") == "_operator":
        writes = node.target in _WRITES and isinstance(value(node.args[0]), torch.Tensor)
        return [node.args[0]] if writes else []
    if node.kwargs.get("out") is not None:
        return [node.kwargs["out"]]
    if _argument(node, "inplace") is True:
        return [node.args[0]]
    schemas = _schemas(node.target)
    if schemas:
        found = [one for schema in schemas for one in _written_by_schema(node, schema)]
        # What is said to write, but not where, may write anywhere.
        anywhere = [node.all_input_nodes] if any(s.is_mutable for s in schemas) else []
        return found or anywhere
    return [node.args[0]] if _named_in_place(getattr(node.target, "__name__", "")) else []


def _argument(node: Node, name: str) -> Any:
    """Return an argument of a Python function, whether it came by keyword or by position."""
    at = _position(node.target, name)
    return node.args[at] if at is not None and at < len(node.args) else node.kwargs.get(name)


@functools.lru_cache(maxsize=512)
def _position(target: Any, name: str) -> int | None:
    if not inspect.isfunction(target):
        return None
    parameters = list(inspect.signature(target).parameters)
    return parameters.index(name) if name in parameters else None


def _schemas(target: Any) -> list[Any]:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    schema = getattr(target, "_schema", None)
    return [] if schema is None else [schema]


def _written_by_schema(node: Node, schema: Any) -> Iterator[Any]:
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if given is not None:
                yield given


def _named_in_place(name: str) -> bool:
    return name.endswith("_") and (not name.startswith("_") or name.startswith("_foreach_"))
