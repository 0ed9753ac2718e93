"""Keep an autocast around a call out of it: its result has the dtype of the queries, on any route.

Operators promise that to the inner compiler, compiled kernels keep it in any case, and products of
means or poses lose what they are compared by in 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_given_dtypes(function: _Function) -> _Function:
    """Run a function without the autocast of the device of its first tensor."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        first = next(given, None)
        if first is None or not is_cast(first.device):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return cast(_Function, run)


def is_cast(device: torch.device) -> bool:
    """Whether calls on a device are in an autocast."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)
