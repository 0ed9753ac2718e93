"""Remember what a call was given, and say in which inputs another call differs.

An input is the same if it is the same object, or lies in the same memory in the same layout, and
nothing has written to it. Small tensors on the host are compared by value too, because prompts and
cameras are often made anew with equal values; tensors on a device are not, because reading one
stops the device. So of a large one, or one on a device, that was made in `torch.inference_mode`,
where torch counts no writes, nothing is known. torch does not count what is written through
`Tensor.data` or numpy.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HOST_ELEMENTS_MAX = 1 << 20


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Held:
    """One input, kept alive so that no other tensor can take its memory.

    Attributes:
        given: what it is.
        version: writes that torch has counted; -1 where it counts none.
        snapshot: a copy where torch counts no writes.
        untold: whether nothing would tell of a write.
    """

    __slots__ = ("given", "snapshot", "untold", "version")

    def __init__(self, given: Any) -> None:
        self.given = given
        self.version = _version(given) if isinstance(given, Tensor) else 0
        # Where torch counts no writes, a copy tells.
        uncounted = isinstance(given, Tensor) and self.version < 0
        self.untold = uncounted and not _is_small(given)
        self.snapshot = given.clone() if uncounted and not self.untold else None

    def is_same(self, other: Any) -> bool:
        """Whether an input of another call is this one, unchanged."""
        mine = self.given
        if not isinstance(mine, Tensor) or not isinstance(other, Tensor):
            return type(mine) is type(other) and bool(mine == other)
        if not (mine is other or _is_same_memory(mine, other)):
            return _is_unwritten(self) and _is_equal(mine, other)
        return _is_unwritten(self)

    def has_kind_of(self, other: Any) -> bool:
        """Whether an input has the shape, dtype and device of this one."""
        mine = self.given
        if not isinstance(mine, Tensor) or not isinstance(other, Tensor):
            return type(mine) is type(other)
        return (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)


def _is_unwritten(held: Held) -> bool:
    if held.untold:
        return False
    if held.snapshot is not None:
        return _is_equal(held.snapshot, held.given)
    return held.version == _version(held.given)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


def on_host(tensor: Tensor) -> np.ndarray | None:
    """Return what a tensor holds as an array of the same memory; None if it lies on a device.

    numpy reads no device, so nothing waits for one; bfloat16 comes as 16-bit integers.
    """
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    plain = tensor.detach().resolve_conj().resolve_neg()
    array: np.ndarray = (
        plain.view(torch.int16) if plain.dtype is torch.bfloat16 else plain
    ).numpy()
    return array


def _is_small(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() <= _HOST_ELEMENTS_MAX


def _is_equal(a: Tensor, b: Tensor) -> bool:
    if not (_is_small(a) and _is_small(b)) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    mine, theirs = on_host(a), on_host(b)
    return mine is not None and theirs is not None and np.array_equal(mine, theirs)


class Watched:
    """Inputs that are remembered without being kept alive; the same objects or nothing."""

    def __init__(self, args: Sequence[Any]) -> None:
        self._tensors = [weakref.ref(a) for a in args if isinstance(a, Tensor)]
        self._state = _state(args)

    def are(self, args: Sequence[Any]) -> bool:
        """Whether these are the same objects and nothing has written to them."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        same = all(ref() is a for ref, a in zip(self._tensors, tensors, strict=True))
        return same and self._state == _state(args)

    def gone(self) -> bool:
        """Whether one of them can not come again."""
        return any(ref() is None for ref in self._tensors)


def _state(args: Sequence[Any]) -> list[Any]:
    return [(_version(a), a.data_ptr()) if isinstance(a, Tensor) else a for a in args]
