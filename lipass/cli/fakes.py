"""Let a model be built of fake tensors and cast on the way, as builders of large models do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def casts_of_fakes(mode: contextlib.AbstractContextManager[Any] | None) -> Iterator[None]:
    """Enter a fake mode in which `.to`, `.half` and `.float` of modules work; None enters nothing.

    torch swaps the insides of a fake parameter with those of its cast, which fails: the fake mode
    remembers both. Here the cast takes the place of the parameter.
    """
    if mode is None:
        yield
        return
    module: Any = torch.nn.Module
    before = module._apply
    module._apply = _apply
    try:
        with mode:
            yield
    finally:
        module._apply = before


def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    for child in self.children() if recurse else ():
        child._apply(fn)
    for key, own in self._parameters.items():
        if own is not None:
            with torch.no_grad():
                cast = fn(own)
            self._parameters[key] = torch.nn.Parameter(cast, own.requires_grad)
    for key, own in self._buffers.items():
        if own is not None:
            self._buffers[key] = fn(own)
    return self
