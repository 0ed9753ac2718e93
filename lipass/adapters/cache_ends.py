"""Keep how far a preallocated cache is filled as an int, where a model keeps it as a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lipass.adapters.adoption import Adoption
from lipass.adapters.host_ints import HostInts, plain

Layers = Iterable[MutableMapping[str, Any]]


class CacheEnd(HostInts):
    """An index of a cache: asked and filled like the tensor in whose place it is."""

    def __init__(self, values: Any, home: MutableMapping[str, Any], name: str) -> None:
        super().__init__(values)
        self.tensor = home[name]
        self._home, self._name = home, name

    def put_back(self) -> None:
        """Put the tensor back, with what it would hold by now."""
        if self._home.get(self._name) is not self:
            return
        own = self.tensor
        now = torch.tensor(plain(self), dtype=own.dtype, device=own.device).view(own.shape)
        # a tensor made under inference mode takes nothing outside of it
        self._home[self._name] = now if own.is_inference() else own.copy_(now)


class CacheEnds:
    """Replace the indices of caches by ints, until an adoption is undone."""

    def __init__(self, adoption: Adoption) -> None:
        self._made: weakref.WeakSet[CacheEnd] = weakref.WeakSet()
        adoption.at_undo(self._put_back)

    def keep(self, layers: Layers) -> None:
        """Read the indices in the caches of all layers once, and leave ints in their place."""
        for layer in layers:
            for name, found in list(layer.items()):
                if is_index(found):
                    layer[name] = end = CacheEnd(found.tolist(), layer, name)
                    self._made.add(end)

    def _put_back(self) -> None:
        for one in list(self._made):
            one.put_back()


def is_index(found: object) -> bool:
    """Whether an entry of a cache is one integer in a tensor."""
    return (
        isinstance(found, Tensor)
        and found.dtype in (torch.long, torch.int)
        and (found.numel() == 1)
    )


def holds_indices(layers: Layers) -> bool:
    """Whether any layer's cache has an index that is a tensor."""
    return any(is_index(found) for layer in layers for found in layer.values())


def tie(layers: Layers) -> bool:
    """Compare the ends of all layers, so that a graph knows them to be one size, not several."""
    first: dict[str, Any] = {}
    same = True
    for layer in layers:
        for name, found in layer.items():
            if isinstance(found, CacheEnd):
                same = same and first.setdefault(name, found.item()) == found.item()
    return same
