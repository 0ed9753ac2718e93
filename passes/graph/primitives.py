"""See which operators of aten a call comes down to, by making it once more on its fake values.

A function of Python, a method and an overload of one operator run the same operators of aten, and
those carry what torch knows: tags, which arguments they write to, what they multiply.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lipass.passes.graph.compat import decomposed, device_of, unguarded, value, without_vmap


@dataclass(frozen=True)
class Primitive:
    """Hold one operator that a call ran."""

    overload: torch._ops.OpOverload
    args: dict[str, Any]
    """What it was given, by the names of its schema; tensors are None."""
    took: frozenset[int] = frozenset()
    """Positions in `node.all_input_nodes` of the tensors among it."""
    flops: int | torch.SymInt = 0
    """Floating point operations of its matrix products, by torch's own formulas."""


@dataclass(frozen=True)
class Trace:
    """Hold what a call ran, and what it did with the tensors that it was given."""

    ran: tuple[Primitive, ...]
    given_back: frozenset[int]
    """Positions in `node.all_input_nodes` of the tensors in whose memory the result lies."""
    written: frozenset[int]
    """Positions of those that an operator wrote to."""

    @functools.cached_property
    def needs(self) -> frozenset[int]:
        """Return the positions of those whose numbers the call needs, not only their shape."""
        took = (one.took for one in self.ran if one.overload.overloadpacket not in _SHAPES)
        return self.given_back.union(*took)


aten = torch.ops.aten
# Made of the shape or the dtype of a tensor, not of its numbers; no tag says so.
_SHAPES = {aten.empty_like, aten.full_like, aten.ones_like, aten.zeros_like}
_SHAPES |= {aten.rand_like, aten.randint_like, aten.randn_like}
_SHAPES |= {aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones, aten.new_zeros}


def trace(node: Node) -> Trace | None:
    """Return what a call runs; None if it cannot be made, as inside of another transform.

    Calls of subgraphs run what their bodies do; see `bodies`.
    """
    call = (node.target, node.args, node.kwargs)
    known = _of_nodes.get(node)
    if known is not None and all(a is b for a, b in zip(known[0], call, strict=True)):
        return known[1]
    found = _trace(node)
    _of_nodes[node] = (call, found)
    return found


def bodies(node: Node) -> list[GraphModule]:
    """List the subgraphs that a node calls, such as the body of a layer that is compiled once."""
    owner = node.graph.owning_module
    if owner is None or not node.op.startswith("call"):
        return []
    names = [one.target for one in node.all_input_nodes if one.op == "get_attr"]
    names += [node.target] if node.op == "call_module" else []
    found = []
    for name in map(str, names):
        module: Any = owner
        for part in name.split("."):
            module = getattr(module, part, None)
        found += [module] if isinstance(module, GraphModule) else []
    return found


def overloads(node: Node) -> list[Any]:
    """Return the overloads that a call may mean: its own, or those of aten by its name."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return [target]
    if node.op == "call_method" or getattr(target, "__module__", "") in _OF_ATEN:
        target = getattr(torch.ops.aten, getattr(target, "__name__", str(target)), None)
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return []
    return [getattr(target, one) for one in target.overloads()]


# `operator.iadd` is `operator.__iadd__`; what has no form without the i is no assignment.
IN_PLACE = {
    function
    for dunder, function in vars(operator).items()
    if dunder.startswith("__i") and f"__{dunder[3:]}" in vars(operator)
} | {operator.setitem, operator.delitem}
"""Functions of Python's `operator` that write to their first argument."""

_OF_ATEN = ("torch", "torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft")
_Known = tuple[tuple[Any, Any, Any], Trace | None]
_of_nodes: weakref.WeakKeyDictionary[Node, _Known] = weakref.WeakKeyDictionary()
# Symbols of sizes mean something within one mode only.
_Made = dict[object, Trace | None]
_of_calls: weakref.WeakKeyDictionary[FakeTensorMode, _Made] = weakref.WeakKeyDictionary()


def _trace(node: Node) -> Trace | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator) or _sets_state(node):
        return None
    mode = _mode(node)
    made = _of_calls.setdefault(mode, {})
    try:
        key = (node.op, node.target, frozen(node.args), frozen(node.kwargs))
        if key not in made:
            made[key] = _run_in_place(node, mode)
        return made[key]
    except TypeError:  # an argument that cannot be hashed
        return _run_in_place(node, mode)


def _run_in_place(node: Node, mode: FakeTensorMode) -> Trace | None:
    """Make a call, in the autocasts of its place where it needs them: others cost a walk."""
    from lipass.passes.graph.modes import entered, inside  # which ask this table

    if (made := _run(node, mode)) is None and (active := entered(node)):
        with inside(active):
            return _run(node, mode)
    return made


def _mode(node: Node) -> FakeTensorMode:
    for one in (node, *node.all_input_nodes):
        for leaf in pytree.tree_leaves(value(one)):
            inner = without_vmap(leaf)
            if isinstance(inner, FakeTensor):
                return inner.fake_mode
    return _no_mode


_no_mode = FakeTensorMode()


def _run(node: Node, mode: FakeTensorMode) -> Trace | None:
    if any(map(_is_transformed, node.all_input_nodes)):
        return None  # its level may be over
    given: dict[int, int] = {}

    def stand_in(at: int) -> Callable[[Any], Any]:
        def make(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
                return leaf
            # Not the value itself, as the call may write to it.
            size, stride = leaf.shape, leaf.stride()
            made = torch.empty_strided(size, stride, dtype=leaf.dtype, device=leaf.device)
            given[_memory(made)] = at
            return made

        return make

    places = {one: at for at, one in enumerate(node.all_input_nodes)}
    with mode, unguarded(mode), torch.no_grad():
        try:
            inputs = {one: pytree.tree_map(stand_in(at), value(one)) for one, at in places.items()}
            args, kwargs = map_arg((node.args, node.kwargs), inputs.__getitem__)
            with _fresh_symbols(mode), _Watch(given) as watch:
                if node.op == "call_method":
                    result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever it is, nothing is known
            return None
    back = frozenset(_positions(result, given))
    return Trace(tuple(watch.ran), back, frozenset(watch.written))


def _positions(part: Any, given: dict[int, int]) -> set[int]:
    """Return which inputs the tensors of an argument or a result lie in."""
    leaves = [x for x in pytree.tree_leaves(part) if isinstance(x, torch.Tensor)]
    return {given[at] for leaf in leaves if (at := _memory(leaf)) in given}


def _sets_state(node: Node) -> bool:
    """Whether a call may be there for what it does to torch itself, which must not happen here."""
    module = getattr(node.target, "__module__", None) or ""
    parts = [value(one) for one in (node, *node.all_input_nodes)]
    handles = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(parts))
    return not handles or module.startswith(_TRANSFORMS)


_TRANSFORMS = ("torch._functorch", "torch._C._functorch", "torch.autograd", "torch._C._autograd")


def _is_transformed(node: Node) -> bool:
    """Whether a value is held by a transform of functions, such as `torch.vmap`."""
    return any(without_vmap(leaf) is not leaf for leaf in pytree.tree_leaves(value(node)))


def _fresh_symbols(mode: FakeTensorMode) -> Any:
    """Let sizes that depend on data come up, without anybody having to bind them."""
    env = mode.shape_env
    return contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


class _Watch(TorchDispatchMode):
    """Write down the operators that run."""

    def __init__(self, given: dict[int, int]) -> None:
        super().__init__()
        self.given = given
        self.ran: list[Primitive] = []
        self.written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (device := device_of(func, args)) is not None:
            return device
        with self:
            parts = decomposed(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        named = by_name(func, args, kwargs)
        for key in written_arguments(func, named):
            self.written |= _positions(named[key], self.given)
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count is not None else 0
        constants = {key: _constant(argument) for key, argument in named.items()}
        took = frozenset(_positions((args, kwargs), self.given))
        self.ran.append(Primitive(func, constants, took, flops))
        return result


def by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an overload by the names of its schema, with the defaults."""
    named = {}
    for i, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        named[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, default)
    return named


def written_arguments(func: Any, named: dict[str, Any]) -> set[str]:
    """Return which arguments an overload writes to."""
    schema = func._schema
    written = {
        one.name
        for one in schema.arguments
        if one.alias_info is not None and one.alias_info.is_write
    }
    # The schemas of batch norms do not say that training moves the statistics.
    if named.get("training") or named.get("train"):
        written |= {"running_mean", "running_var"} & named.keys()
    return written


def _constant(argument: Any) -> Any:
    return pytree.tree_map(lambda x: None if isinstance(x, torch.Tensor) else x, argument)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def frozen(part: Any) -> object:
    """Return something hashable that is equal for calls on equal metadata."""
    if isinstance(part, Node) and value(part) is None:
        return part  # a submodule: another one may compute something else
    part = value(part)
    if isinstance(part, torch.Tensor):
        sizes = (*part.shape, *part.stride())
        return (part.dtype, part.device, part.dim(), *map(frozen, sizes))
    if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return part.node.expr
    if isinstance(part, (list, tuple)):
        return (type(part), *map(frozen, part))
    if isinstance(part, dict):
        return tuple((key, frozen(item)) for key, item in part.items())
    if isinstance(part, slice):
        return (slice, *map(frozen, (part.start, part.stop, part.step)))
    return (type(part), part if part.__hash__ else id(part))
