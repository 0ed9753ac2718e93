"""Uncover attention that models keep from graphs, wherever their modules bind it by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.stand_ins import is_wan_like, stand_in

_WORDS = ("attention", "attn")
_FLASH = "flash attention, in calls of torch"
_SHOWN = "shown: torch.compiler.disable hid it"


def show_attention(model: nn.Module, adoption: Adoption) -> None:
    """Bind anew each attention function that modules of the model's package hide from Dynamo."""
    roots = _roots(model)
    for module in modules_of(model):
        for name, found in list(vars(module).items()):
            if adoption.hold(module, name, _FLASH) or adoption.hold(module, name, _SHOWN):
                continue
            plain = _disabled(found) if any(word in name.lower() for word in _WORDS) else None
            seen = found if plain is None else plain
            shown = None if _is_plain(seen, roots) else stand_in(seen, name)
            if shown is not None:
                adoption.rebind(module, name, shown, _FLASH)
            elif plain is not None:
                adoption.rebind(module, name, plain, _SHOWN)


def _is_plain(found: object, roots: set[str]) -> bool:
    """Say whether Dynamo reads a function of the model's own code, whatever it is called."""
    own = isinstance(found, FunctionType) and _root(found) in roots
    return own and not is_wan_like(found)


def _disabled(found: object) -> Callable[..., Any] | None:
    """Return the function behind `torch.compiler.disable`, or nothing."""
    if not getattr(found, "_torchdynamo_disable", False):
        return None
    plain = getattr(found, "_torchdynamo_orig_callable", None)
    return plain if callable(plain) else None


def _roots(model: nn.Module) -> set[str]:
    """Return the packages whose classes the model is made of."""
    return {_root(type(part)) for part in model.modules()} - {"torch", "lipass"}


def _root(found: object) -> str:
    return str(getattr(found, "__module__", "")).partition(".")[0]


def modules_of(model: nn.Module) -> Iterator[ModuleType]:
    """Yield the loaded modules of the packages whose classes the model is made of."""
    roots = _roots(model)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in roots and isinstance(module, ModuleType):
            yield module
