"""Print a graph for goldens: one line per node, no ids, no parameters, stable symbols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import invoke_subgraph, is_parameter, value
from lipass.passes.graph.names import module_path

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}
_SYMBOL = re.compile(r"\b[su]\d+\b")


def print_graph(graph: Graph) -> str:
    """Return the graph as text: `$name` is an input, `%name` a node.

    Inputs that are parameters appear only where they are used.

    Symbols of sizes are renamed `n0, n1, ...` in the order of the inputs, because torch draws
    their names from a hash of the source.
    """
    printer = _Printer(graph)
    lines = (printer.line(node) for node in graph.nodes if not _is_hidden(node))
    return "".join(f"{line}\n" for line in lines)


def _is_hidden(node: Node) -> bool:
    if node.op == "get_attr":
        return all(is_call(user, invoke_subgraph) for user in node.users)
    return node.op == "placeholder" and is_parameter(node)


class _Printer:
    def __init__(self, graph: Graph) -> None:
        self.symbols: dict[str, str] = {}
        self.names = {node: self._name(node) for node in graph.nodes}

    def line(self, node: Node) -> str:
        if node.op == "output":
            return f"return {self._arg(node.args[0])}"
        path = module_path(node)
        where = f"  # {path}" if path else ""
        return f"{self.names[node]}{self._type(value(node))} = {self._call(node)}{where}"

    def _name(self, node: Node) -> str:
        if node.op != "placeholder":
            return f"%{node.name}"
        if isinstance(value(node), torch.SymInt):
            return f"${self._rename(str(value(node)))}"
        name = re.sub(r"^l_(self_|model_)?|_$", "", node.name)
        return "$" + re.sub(r"_?(modules|parameters|buffers)_", ".", name).strip(".")

    def _rename(self, text: str) -> str:
        return _SYMBOL.sub(
            lambda m: self.symbols.setdefault(m.group(), f"n{len(self.symbols)}"), text
        )

    def _type(self, tensor: Any) -> str:
        if isinstance(tensor, torch.Tensor):
            shape = ", ".join(self._rename(str(size)) for size in tensor.shape)
            return f": {_DTYPES.get(tensor.dtype, str(tensor.dtype))}[{shape}]"
        return f": {self._rename(str(tensor))}" if isinstance(tensor, torch.SymInt) else ""

    def _call(self, node: Node) -> str:
        if node.op == "placeholder":
            return "input"
        if node.op == "get_attr":
            return f"attribute {node.target}"
        if node.op == "call_module":
            return self._body(node.target, node.args)
        if is_call(node, invoke_subgraph):
            body, _, *operands = node.args
            return self._body(body.target, operands)
        args = [self._arg(arg) for arg in node.args]
        args += [f"{key}={self._arg(arg)}" for key, arg in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        return f"{_target(node.target)}({', '.join(args)})"

    def _body(self, name: object, operands: Sequence[Any]) -> str:
        """Write the call of a graph of its own, which has its own text."""
        inputs = [arg for arg in operands if not (isinstance(arg, Node) and _is_hidden(arg))]
        hidden = len(operands) - len(inputs)
        return f"{name}({', '.join(map(self._arg, inputs))}; {hidden} parameters)"

    def _arg(self, arg: Any) -> str:
        if isinstance(arg, Node):
            return self.names[arg]
        if isinstance(arg, (list, tuple)):
            inner = ", ".join(self._arg(item) for item in arg)
            return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
        if isinstance(arg, slice):
            ends = [arg.start, arg.stop] + ([arg.step] if arg.step is not None else [])
            return ":".join("" if end is None else self._arg(end) for end in ends)
        if isinstance(arg, (torch.SymInt, torch.SymFloat)):
            return self._rename(str(arg))
        return repr(arg)


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return getattr(target, "__name__", str(target))
