"""Know which family a model is of, without importing any of them."""

from __future__ import annotations

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
    "matrix_game_3",
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

    def has(self, kind: type) -> bool:
        """Whether a class of models is of it, by its name or the name of one above it."""
        names = [f"{one.__module__}.{one.__qualname__}" for one in kind.__mro__]
        return any(name.endswith(end) for name in names for end in self.classes)


def family_of(kind: type) -> Family | None:
    """Return the first family that a class of models is of."""
    return next((family for family in all_families() if family.has(kind)), None)


def all_families() -> Iterator[Family]:
    """Yield every family that is known here."""
    for name in FAMILIES:
        yield import_module(f"lipass.adapters.{name}").FAMILY
