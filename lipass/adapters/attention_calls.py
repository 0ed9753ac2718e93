"""Uncover attention that models keep from graphs, wherever their modules bind it by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from lipass.adapters.adoption import Adoption

_WORDS = ("attention", "attn")


def show_attention(model: nn.Module, adoption: Adoption) -> None:
    """Bind anew each attention function that modules of the model's package hide from Dynamo."""
    for module in _modules(model):
        for name, found in list(vars(module).items()):
            if not any(word in name.lower() for word in _WORDS):
                continue
            hidden = _disabled(found)
            if hidden is not None:
                adoption.rebind(module, name, hidden, "shown: torch.compiler.disable hid it")


def _disabled(found: object) -> Callable[..., Any] | None:
    """Return the function behind `torch.compiler.disable`, or nothing."""
    if not getattr(found, "_torchdynamo_disable", False):
        return None
    plain = getattr(found, "_torchdynamo_orig_callable", None)
    return plain if callable(plain) else None


def _modules(model: nn.Module) -> Iterator[ModuleType]:
    """Yield the loaded modules of the packages whose classes the model is made of."""
    roots = {type(part).__module__.partition(".")[0] for part in model.modules()} - {"torch"}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in roots and isinstance(module, ModuleType):
            yield module
