"""Know which model a graph belongs to, when it is compiled and when it is called.

A model is known by its parameters. Dynamo gives several models of one class one graph, whose
parameters are arguments; so who is calling shows in each call only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from lipass.kernels import registry
from lipass.passes.graph.frame import compiled_frame, real_input
from lipass.receipt import SiteRecord, current_report

Compiled = Callable[..., Any]

_lock = threading.Lock()
_names: Any = WeakIdKeyDictionary()
"""Parameter to the name of its model."""
_paths: Any = WeakIdKeyDictionary()
"""Parameter to its path in its model, where that has been seen whole."""


class GraphModel:
    """The model of one graph.

    Attributes:
        name: its class; `Class#2` for the second one of a class.
        part: path of the module in it whose graph this is; "" where that is the model itself.
    """

    def __init__(self, name: str, kind: str, places: Sequence[int], part: str = "") -> None:
        self.name = name
        self.part = part
        self._kind = kind
        self._places = tuple(places)

    def counting(self, compiled: Compiled, records: Sequence[SiteRecord], owner: str) -> Compiled:
        """Return the graph so that its calls are counted for the model that calls.

        Args:
            compiled: the graph.
            records: its sites.
            owner: what the report calls the model that it was compiled for; "" where no other
                model has sites of these names.
        """
        if not records or not (self._places or owner):
            return compiled
        seen: list[tuple[Any, str]] = []  # the latest caller: mostly there is one
        if not self._places:
            seen.append((lambda: None, owner))

        def run(*args: Any) -> Any:
            first = args[self._places[0]] if self._places else None
            if not seen or seen[0][0]() is not first:
                seen[:] = [(weakref.ref(first), self._owner(args, records, owner))]
            if not seen[0][1]:
                return compiled(*args)
            with registry.counted_for(seen[0][1]):
                return compiled(*args)

        return run

    def _owner(self, args: Sequence[Any], records: Sequence[SiteRecord], owner: str) -> str:
        own = [args[place] for place in self._places]
        name, part = _name(own, self._kind), _part(own, self.part) if self.part else ""
        if (name, part) == (self.name, self.part):
            return owner
        return current_report().add_sites(records, model=name, part=part)


def model_of(gm: torch.fx.GraphModule) -> GraphModel:
    """Find out whose graph this is; call it while the graph is being compiled."""
    code, module = compiled_frame()
    inputs = [real_input(node) for node in gm.graph.find_nodes(op="placeholder")]
    places = [n for n, given in enumerate(inputs) if isinstance(given, Parameter)]
    own = [inputs[n] for n in places]
    kind = code or "graph"
    if module is not None:
        kind = type(module).__name__
        own += module.parameters()
    name = _name(own, kind) if own else kind
    if module is None:
        return GraphModel(name, kind, places)
    if name.partition("#")[0] == kind:
        with _lock:
            _paths.update({one: path for path, one in module.named_parameters()})
        return GraphModel(name, kind, places)
    return GraphModel(name, kind, places, _path_of(module))


def _name(parameters: Iterable[Any], kind: str) -> str:
    """Name the model that has one of these parameters, and remember them all."""
    parameters = list(parameters)
    with _lock:
        known = [name for one in parameters if (name := _names.get(one))]
        mine: str = known[0] if known else _free(kind)
        for one in parameters:
            _names.setdefault(one, mine)
    return mine


def _path_of(module: torch.nn.Module) -> str:
    """Return the path of a module in its model, where that has been seen whole, or nothing."""
    with _lock:
        for name, one in module.named_parameters():
            if path := _paths.get(one):
                return str(path).removesuffix(name).rstrip(".")
    return ""


def _part(parameters: Iterable[Any], like: str) -> str:
    """Return the path of the module that some parameters are of, as deep as another path is."""
    with _lock:
        paths = [_paths[one] for one in parameters if one in _paths]
    return ".".join(paths[0].split(".")[: like.count(".") + 1]) if paths else ""


def _free(kind: str) -> str:
    held, number, name = set(_names.values()), 1, kind
    while name in held:
        number += 1
        name = f"{kind}#{number}"
    return name
