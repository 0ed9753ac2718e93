"""Find attention that no site shows, in a graph and in what runs between graphs; for `strict`.

In a graph: an operator nobody knows that takes queries, keys and values or is named so, a softmax
between two products, and attention in bodies that no pass looks into.

Between graphs: Dynamo leaves out what is behind `torch.compiler.disable`, extensions and graph
breaks. Names and code objects at a break do not say what such code will call, so the first calls
are watched by a profile function, which torch does not see and no guard depends on. It is there
only between two graphs of one call of the model.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from lipass.compile.sites import graphs_of
from lipass.errors import LipassError
from lipass.passes.attention.site import site_of
from lipass.passes.graph.compat import is_parameter, value
from lipass.passes.graph.frame import compiled_frame
from lipass.passes.graph.names import call_line

Compiled = Callable[..., Any]

# What attention is called where it is one call, of torch and of the libraries that models use.
_CALLS = frozenset(
    (
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "flex_attention",
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_kvpacked_func",
        "memory_efficient_attention",
        "sageattn",
        "sageattn_varlen",
    )
)
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "mm"})
_WEIGHTS = frozenset({"softmax", "_softmax", "exp"})
_OURS = frozenset({"aten", "prims", "lipass", "higher_order", "_c10d_functional"})
_NEAR = 12
_WATCHED_CALLS = 2

_TORCH = str(Path(torch.__file__).parent)
_DYNAMO = os.path.join(_TORCH, "_dynamo", "")
# Frames that stand between a model and its graphs: torch's, and those of this folder.
_BETWEEN = (
    os.path.join(_TORCH, "_"),
    os.path.join(_TORCH, "fx", ""),
    os.path.join(_TORCH, "nn", "modules", "module.py"),
    str(Path(__file__).parent),
)
_REMEDY = (
    "write it as torch.nn.functional.scaled_dot_product_attention where Dynamo sees it, or set "
    "strict to False"
)


def refuse_unseen(gm: torch.fx.GraphModule) -> None:
    """Raise where a rewritten graph still holds attention that no pass has understood.

    Raises:
        LipassError: names the call and its line.
    """
    for graph in graphs_of(gm):
        for node in graph.nodes:
            what = _opaque(node) or _by_hand(node)
            if what:
                where = call_line(node) or node.name
                raise LipassError(
                    f"strict: every attention must be a site, got {what} at {where}, which no "
                    f"pass knows; {_REMEDY}"
                )


def _opaque(node: Node) -> str | None:
    target = node.target
    if node.op != "call_function":
        return None
    if _name(node) in _CALLS:  # such as in the body of a branch or of a checkpoint
        return None if site_of(node) else _name(node)
    space = getattr(target, "namespace", None) or _packet_space(target)
    if space is None or space in _OURS:
        return None
    tensors = [value(arg) for arg in node.all_input_nodes]
    is_named = any(word in str(target).lower() for word in ("attn", "attention"))
    return f"the operator {target}" if is_named or _like_qkv(tensors) else None


def _packet_space(target: object) -> str | None:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).partition("::")[0]
    return None


def _like_qkv(tensors: Iterable[object]) -> bool:
    """Whether three tensors `[.., L, D]` of one head dim and batch are among these."""
    found: Counter[tuple[object, ...]] = Counter()
    for one in tensors:
        if isinstance(one, Tensor) and one.dim() >= 3 and one.is_floating_point():
            found[(one.dim(), str(one.shape[0]), str(one.shape[-1]))] += 1
    return any(count >= 3 for count in found.values())


def _by_hand(node: Node) -> str | None:
    if _name(node) not in _WEIGHTS:
        return None
    behind = (one for one in _near(node, lambda n: list(n.users)) if _is_product(one))
    before = (one for one in _near(node, lambda n: n.all_input_nodes) if _is_product(one))
    if next(behind, None) is None or next(before, None) is None:
        return None
    return f"a {_name(node)} between two products"


def _near(node: Node, onward: Callable[[Node], list[Node]]) -> Iterator[Node]:
    """Walk over a few nodes that are no products."""
    waiting, seen = onward(node), 0
    while waiting and seen < _NEAR:
        one = waiting.pop(0)
        seen += 1
        yield one
        if not _is_product(one):
            waiting += onward(one)


def _is_product(node: Node) -> bool:
    """Whether two activations are multiplied: a linear layer weighs by parameters."""
    return _name(node) in _PRODUCTS and not any(map(_parameter, node.all_input_nodes))


def _parameter(node: Node) -> bool:
    while node.op != "placeholder" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr" or (node.op == "placeholder" and is_parameter(node))


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "").partition(".")[0]


class Watch:
    """One call of a compiled model: which graphs it runs, and what runs between them."""

    def __init__(self, root: FrameType, outer: Watch | None) -> None:
        self.root = root
        self.sites = 0
        self._outer = outer
        self._compiling: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Be the profile function: look at what is called."""
        if self._compiling is not None:
            if event == "return" and frame is self._compiling:
                self._compiling = None
        elif event == "c_call":
            name = getattr(arg, "__name__", "")
            if name in _CALLS or (name == "softmax" and _weighs(frame)):
                self._refuse(name, frame)
        elif event == "call":
            self._look_at(frame)
        elif event == "return" and frame is self.root:
            sys.setprofile(self._outer)
            if self.sites == 0 and arg is not None:  # None where an error passes
                raise LipassError(_none_found(self.root.f_code.co_qualname))

    def _look_at(self, frame: FrameType) -> None:
        code = frame.f_code
        if code in _OPERATORS:
            operator, args = frame.f_locals.get("self"), frame.f_locals.get("args", ())
            space = getattr(operator, "namespace", None) or _packet_space(operator)
            known = space in _OURS and "scaled_dot_product" not in str(operator)
            if not known and _like_qkv(args):
                self._refuse(f"the operator {operator}", frame.f_back or frame)
        elif code.co_filename.startswith(_DYNAMO) and "convert_frame" in code.co_filename:
            self._compiling = frame
        elif code.co_name in _CALLS:
            self._refuse(code.co_name, frame.f_back or frame)

    def _refuse(self, what: str, frame: FrameType) -> None:
        code = frame.f_code
        where = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_qualname}"
        raise LipassError(
            f"strict: every attention must be in a graph, got {what} at {where}, which runs "
            f"between graphs; {_REMEDY}"
        )


def _weighs(frame: FrameType) -> bool:
    """Whether the model's code that calls a softmax has two products, as attention by hand has."""
    one: FrameType | None = frame
    while one is not None and one.f_code.co_filename.startswith(_TORCH):
        one = one.f_back
    return one is not None and _products_in(one.f_code) >= 2


@functools.lru_cache(maxsize=256)
def _products_in(code: CodeType) -> int:
    called = [step.argval for step in dis.get_instructions(code) if step.argval in _PRODUCTS]
    signs = [step for step in dis.get_instructions(code) if step.argrepr in ("@", "@=")]
    return len(called) + len(signs)


_OPERATORS: tuple[CodeType, ...] = (
    torch._ops.OpOverloadPacket.__call__.__code__,
    torch._ops.OpOverload.__call__.__code__,
)


def watched(compiled: Compiled, sites: int, *, whole: bool) -> Compiled:
    """Return a graph that looks for hidden attention the first times that it is called.

    Args:
        compiled: the graph.
        sites: attention sites in it.
        whole: whether the graph ends where its function does.
    """
    calls = 0

    def run(*args: Any) -> Any:
        nonlocal calls
        before = sys.getprofile()
        outer = before if isinstance(before, Watch) else None
        root, top = _root(sys._getframe(1))
        if root is None or (before is not None and outer is None):
            return compiled(*args)  # somebody profiles: two cannot
        watch = outer
        if outer is None or outer.root is not root:
            calls += 1
            if calls > _WATCHED_CALLS:
                return compiled(*args)
            if whole and top:
                if sites == 0:
                    raise LipassError(_none_found(root.f_code.co_qualname))
                return compiled(*args)
            watch = Watch(root, outer)
        assert watch is not None
        watch.sites += sites
        sys.setprofile(None)
        try:
            return compiled(*args)
        finally:
            sys.setprofile(watch)

    return run


def is_whole(reason: Any) -> bool:
    """Whether the graph being compiled is all of its function; reason: why it ends."""
    code, _ = compiled_frame()
    return not getattr(reason, "graph_break", False) and not code.startswith("torch_dynamo_resume")


def _root(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """Return the frame that `torch.compile` was asked for, and whether it calls this graph."""
    last, passed = None, 0
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_DYNAMO) and frame.f_code.co_name == "compile_wrapper":
            return last, passed == 1
        if not file.startswith(_BETWEEN):
            last, passed = frame, passed + 1
        frame = frame.f_back
    return None, False


def _none_found(name: str) -> str:
    return (
        f"strict: a model must have attention that is seen, got none in {name}: no graph has a "
        f"site; look at it with `lipass inspect`; {_REMEDY}"
    )
