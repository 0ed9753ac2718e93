"""Make `HostInts` where released code makes small tensors of sizes.

A module that is adopted gets copies of `torch` and `math` whose constructors keep sizes on the
host; what is no size they hand on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from lipass.adapters.host_ints import HostInts, as_tensor

_INTEGERS = (None, torch.long, torch.int)


def with_host_ints(module: ModuleType) -> ModuleType:
    """Return a copy of `torch` that makes `HostInts` where `module` makes tensors of sizes."""
    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module))
    vars(copy).update(tensor=_tensor, stack=_stack, cat=_cat)
    return copy


def with_products(module: ModuleType) -> ModuleType:
    """Return a copy of `math` whose `prod` of `HostInts` is one, which has `item`."""
    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module))
    vars(copy).update(prod=_prod)
    return copy


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **named: Any) -> Any:
    listed = isinstance(data, (list, tuple)) and not isinstance(data, torch.Size) and dtype
    if device is None and dtype in _INTEGERS and not named:
        if isinstance(data, torch.Size):
            return HostInts(list(data))
        if listed and data and all(isinstance(one, int) for one in data):
            return HostInts(list(data))
        if listed and data and all(isinstance(one, torch.Size) for one in data):
            return HostInts([list(one) for one in data])
    return torch.tensor(data, dtype=dtype, device=device, **named)


def _stack(tensors: Sequence[Any], dim: int = 0, **named: Any) -> Any:
    if dim == 0 and tensors and all(isinstance(one, HostInts) for one in tensors):
        return HostInts([one.tolist() for one in tensors])
    return torch.stack([as_tensor(one) for one in tensors], dim, **named)


def _cat(tensors: Sequence[Any], dim: int = 0, **named: Any) -> Any:
    if dim == 0 and tensors and all(isinstance(one, HostInts) for one in tensors):
        return HostInts([value for one in tensors for value in one.tolist()])
    return torch.cat([as_tensor(one) for one in tensors], dim, **named)


def _prod(values: Any, **named: Any) -> Any:
    return values.prod() if isinstance(values, HostInts) else math.prod(values, **named)
