"""Turn what stages hand over into one run of bytes and a line of text, and back.

Nothing that runs code is ever read: tensors go as their bytes, all else as JSON. What stays in one
process is handed over in the same way as what crosses to another.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Every tensor begins where any dtype may.
_ALIGNED = 64


class Packet(NamedTuple):
    """One item, ready to be handed over."""

    text: str
    """JSON: how the item is built, and dtype and shape of its tensors."""
    data: Tensor
    """Bytes of the tensors `[N]`, a copy."""


def pack(item: object, device: torch.device | str = "cpu") -> Packet:
    """Copy an item of plain data and tensors.

    Args:
        item: a tensor, number, text, bool or None, or tuples, lists and dicts of these.
        device: where the bytes are to lie.

    Raises:
        TypeError: anything else among it.
    """
    tensors: list[Tensor] = []
    built = _build(item, tensors)
    starts = [0]
    for one in tensors:
        starts.append(starts[-1] + math.ceil(_bytes(one.dtype, one.shape) / _ALIGNED) * _ALIGNED)
    data = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    for one, start in zip(tensors, starts, strict=False):
        _part(data, start, one.dtype, one.shape).copy_(one.detach())
    kinds = [(str(one.dtype).removeprefix("torch."), list(one.shape)) for one in tensors]
    return Packet(json.dumps([built, kinds, starts[-1]]), data)


def room_for(text: str, device: torch.device | str = "cpu") -> Tensor:
    """Make memory for the bytes of a packet that is about to come."""
    return torch.empty(json.loads(text)[2], dtype=torch.uint8, device=device)


def unpack(packet: Packet, device: torch.device | str | None = None) -> Any:
    """Return the item of a packet; its tensors lie in the packet's memory, or on `device`."""
    built, kinds, _ = json.loads(packet.text)
    data = packet.data if device is None else packet.data.to(device)
    tensors, start = [], 0
    for name, shape in kinds:
        dtype = getattr(torch, name)
        tensors.append(_part(data, start, dtype, shape))
        start += math.ceil(_bytes(dtype, shape) / _ALIGNED) * _ALIGNED
    return _rebuild(built, tensors)


def _bytes(dtype: torch.dtype, shape: Any) -> int:
    return math.prod(shape) * dtype.itemsize


def _part(data: Tensor, start: int, dtype: torch.dtype, shape: Any) -> Tensor:
    return data[start : start + _bytes(dtype, shape)].view(dtype).view(shape)


def _build(item: object, tensors: list[Tensor]) -> Any:
    if item is None or type(item) in (bool, int, float, str):
        return item
    if isinstance(item, Tensor) and item.layout is torch.strided and not item.is_quantized:
        tensors.append(item)
        return {"tensor": len(tensors) - 1}
    if type(item) in (list, tuple):
        assert isinstance(item, list | tuple)
        return {type(item).__name__: [_build(one, tensors) for one in item]}
    if type(item) is dict:
        return {"dict": [[_build(k, []), _build(v, tensors)] for k, v in _items(item)]}
    raise TypeError(
        "what is handed over must be tensors, numbers, text, bools, None, and tuples, lists and "
        f"dicts of these, got {item!r:.60} of kind {type(item).__name__}; take it apart, an array "
        "with torch.from_numpy, an object with vars"
    )


def _items(item: dict[Any, Any]) -> list[tuple[Any, Any]]:
    for key in item:
        if key is not None and type(key) not in (bool, int, float, str):
            raise TypeError(
                f"keys of what is handed over must be text or numbers, got {key!r:.60} of kind "
                f"{type(key).__name__}; name it with text"
            )
    return list(item.items())


def _rebuild(built: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(built, dict):
        return built
    ((kind, parts),) = built.items()
    if kind == "tensor":
        return tensors[parts]
    if kind == "dict":
        return {_rebuild(k, []): _rebuild(v, tensors) for k, v in parts}
    found = [_rebuild(one, tensors) for one in parts]
    return tuple(found) if kind == "tuple" else found
