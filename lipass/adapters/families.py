"""Know which family a model is of, without importing any of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lipass.adapters.adoption import Adoption

FAMILIES: tuple[str, ...] = (
    "hy_worldplay",
    "self_forcing",
    "causal_forcing",
    "minwm",
    "matrix_game_3",
    "lingbot_world",
    "open_oasis",
    "mochi",
)
"""Modules of this folder, each with a `FAMILY`."""


@dataclass(frozen=True)
class Family:
    """What cannot be found in a graph of a family of models."""

    name: str
    classes: tuple[str, ...]
    """Ends of qualified class names (`module.Class`) by which one of its models is known."""
    adopt: Callable[[nn.Module, Adoption], None]
    """Bind anew what keeps a model's attention out of graphs, and what recompiles."""
    drive: Callable[[Any, Any, Adoption], None] | None = None
    """`drive(pipeline, session, adoption)`: let the pipeline's own rollout ask the session for
    context and steps; everything that it binds goes through the adoption."""
    takes: tuple[str, ...] = ()
    """Arguments of its models' `forward`, where other models have the same file and class name."""

    def has(self, kind: type) -> bool:
        """Whether a class of models is of it, by its name or the name of one above it."""
        for one in kind.__mro__:
            name = f"{one.__module__}.{one.__qualname__}"
            if any(name.endswith(end) for end in self.classes):
                return not self.takes or set(self.takes) <= set(_arguments(one))
        return False


def _arguments(kind: type) -> tuple[str, ...]:
    """Return what calls of a class of models take."""
    forward = vars(kind).get("forward")
    return tuple(inspect.signature(forward).parameters) if callable(forward) else ()


def family_of(kind: type) -> Family | None:
    """Return the first family that a class of models is of."""
    return next((family for family in all_families() if family.has(kind)), None)


def all_families() -> Iterator[Family]:
    """Yield every family that is known here."""
    for name in FAMILIES:
        yield import_module(f"lipass.adapters.{name}").FAMILY
