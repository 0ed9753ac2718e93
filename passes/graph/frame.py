"""Ask Dynamo about the function that a graph is of, which no graph shows."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
import torch._higher_order_ops.invoke_subgraph
import torch.fx
import torch.nn.attention
from torch._dynamo.source import TensorPropertySource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import SymNodeVariable
from torch._dynamo.variables.base import AttributeMutationNew
from torch._dynamo.variables.lists import BaseListVariable


def _user_names(text: str) -> str:
    """Take Dynamo's marks of locals and globals out of an expression."""
    return re.sub(r"\b[LG]\['(\w+)'\]", r"\1", text)


def _user_name(source: Any) -> str:
    """Return the name of a source without Dynamo's marks of locals and globals."""
    try:
        name = getattr(source, "name", "")
        name = str(name() if callable(name) else name)
    except NotImplementedError:  # a variable of an enclosing function, or Dynamo's own
        name = getattr(source, "local_name", "")
    return _user_names(str(name))


def source_name(placeholder: torch.fx.Node) -> str:
    """Return what the user's code calls an input, such as `text` or `cache[0]`."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return _user_name(source) or placeholder.name.removeprefix("l_").strip("_")


@dataclass(frozen=True)
class Frame:
    """What Dynamo knows of the function that a graph is of, and no graph shows.

    Attributes:
        is_whole: the graph begins where the function does and ends where it does.
        changes: what the function changes outside of the graph (attributes, lists, globals), but
            for what follows from guards and sizes: Dynamo writes that behind the graph, whether
            it has run or not.
    """

    is_whole: bool = True
    changes: tuple[str, ...] = ()


def frame_being_compiled(graph: torch.fx.Graph) -> Frame:
    """Describe the function whose graph a backend is given; called outside of one, a whole one."""
    try:
        output = InstructionTranslator.current_tx().output
    except (AttributeError, AssertionError):
        return Frame()
    resumed = output.root_tx.f_code.co_name.startswith("torch_dynamo_resume_in")
    why = getattr(graph.owning_module, "compile_subgraph_reason", None)
    changed = [
        one
        for one in output.side_effects._get_modified_vars()
        if getattr(one, "source", None) is not None
        and not hasattr(one, "proxy")
        and not isinstance(one.mutation_type, AttributeMutationNew)
    ]
    attributes = output.side_effects.store_attr_mutations
    names = []
    for one in changed:
        of = _user_name(one.source)
        if not of:
            continue
        written = attributes.get(one) or _changed_items(one)
        if written is not None and all(map(_is_constant, written.values())):
            continue
        kept = [name for name, now in (written or {}).items() if not _is_constant(now)]
        cell = kept == ["cell_contents"]
        names += [f"{of}.{name}" for name in kept if not cell] or [of]
    return Frame(not resumed and not (why and why.graph_break), tuple(names))


def _changed_items(variable: Any) -> dict[str, Any] | None:
    """Return what Dynamo has seen written to a dict, such as that of buffers; None for others."""
    before, after = (getattr(variable, name, None) for name in ("original_items", "items"))
    if not isinstance(before, dict) or not isinstance(after, dict):
        return None
    old, new = ({_key(key): now for key, now in one.items()} for one in (before, after))
    return {key: new.get(key) for key in old | new if new.get(key) is not old.get(key)}


def _key(key: Any) -> str:
    return str(getattr(getattr(key, "vt", key), "value", ""))


def _is_constant(variable: Any) -> bool:
    """Whether what is written follows from the guards and the sizes of the tensors of a call."""
    if isinstance(variable, SymNodeVariable):
        return _is_of_sizes(variable.sym_num)
    if isinstance(variable, BaseListVariable):
        return all(map(_is_constant, variable.items))
    known = getattr(variable, "is_python_constant", None)
    try:
        return bool(callable(known) and known())
    except NotImplementedError:
        return False


def _is_of_sizes(number: Any) -> bool:
    """Whether a number is computed from sizes of tensors alone, not from numbers given."""
    node = getattr(number, "node", None)
    sources = getattr(getattr(node, "shape_env", None), "var_to_sources", None)
    if sources is None:
        return False
    return all(
        any(isinstance(one, TensorPropertySource) for one in sources.get(symbol, ()))
        for symbol in node.expr.free_symbols
    )


def real_input(placeholder: torch.fx.Node) -> object:
    """Return what Dynamo was called with for a placeholder, or None where it does not say."""
    held = getattr(placeholder.meta.get("grapharg"), "_example", None)
    return held() if callable(held) and not isinstance(held, torch.Tensor) else held


def compiled_frame() -> tuple[str, torch.nn.Module | None]:
    """Return the name of the function that is being compiled, and the model that it is part of.

    The model is its `self`, or the one module among its arguments.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root = InstructionTranslator.current_tx().output
        name, local = str(root.root_tx.f_code.co_name), dict(root.local_scope)
    except (ImportError, AttributeError):
        return "", None
    mine = local.get("self")
    if isinstance(mine, torch.nn.Module):
        return name, mine
    modules = [one for one in local.values() if isinstance(one, torch.nn.Module)]
    return name, modules[0] if len(modules) == 1 else None


class _Kept(list[Any]):
    """Callbacks of which one outlives `torch._dynamo.reset`: it is no cache."""

    def __init__(self, others: list[Any], own: Callable[[Any], None]) -> None:
        super().__init__([*others, own])
        self._own = own

    def clear(self) -> None:
        super().clear()
        self.append(self._own)


def on_compile_end(callback: Callable[[], None]) -> None:
    """Have a function called whenever Dynamo ends a compilation, from within it."""
    handler = getattr(torch._dynamo, "callback_handler", None)
    if isinstance(getattr(handler, "end_callbacks", None), list):
        handler.end_callbacks = _Kept(handler.end_callbacks, lambda _: callback())


def when_left(callback: Callable[[], None]) -> None:
    """Have a function called when the compilation that ends now has been left; it may raise."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        stack = frame.f_locals.get("stack")
        if frame.f_code.co_name == "compile_inner" and isinstance(stack, contextlib.ExitStack):
            stack.callback(callback)
            return
        frame = frame.f_back


def recompile_reasons(code: CodeType) -> list[str]:
    """Return the guards that failed when a function was compiled again, in order."""
    try:
        from torch._dynamo.utils import get_compilation_metrics
    except ImportError:
        return []
    found = []
    for one in get_compilation_metrics():
        place = (getattr(one, "co_filename", None), getattr(one, "co_firstlineno", None))
        reason = getattr(one, "recompile_reason", None)
        if place == (code.co_filename, code.co_firstlineno) and reason:
            text = _user_names(re.sub(r"^\d+/\d+: ", "", reason.splitlines()[0]))
            found.append(re.split(r"\s{2,}#", text)[0].strip())
    return found


def is_recompile() -> bool:
    """Whether the function that is being compiled has been compiled before."""
    current = torch._guards.CompileContext.current_compile_id()
    return bool(getattr(current, "frame_compile_id", 0))
