"""Say what a stage is: a name, and how what computes is made, here or in a process of its own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Computes(Protocol):
    """What a stage is made to be: a callable of one item.

    It may have two methods besides: `forget(count)`, called before the next item when the last
    `count` results that it returned were given up and never shown, and `close()`, called once at
    the end.
    """

    def __call__(self, item: Any) -> Any:
        """Compute what is handed to the next stage."""


@dataclass(frozen=True)
class Stage:
    """One stage of a line.

    Args:
        name: what messages call it.
        make: what is called, where the stage is to run, to make what computes: a function or class
            that can be imported, or its name, `"module:name"`.
        options: keyword arguments of `make`; plain data, such as a path to weights.
        device: where tensors of an item are put before a call, such as `"cuda:1"`; None leaves
            them on the host.
        threads: threads of torch in a process of its own; None gives it an equal share.

    Raises:
        TypeError: a part of the wrong kind.
        ValueError: no name, no `module:name`, or fewer threads than one.
    """

    name: str
    make: str | Callable[..., Computes]
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what could only fail later, in another process."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a stage must have a name, got {self.name!r}; such as 'decode'")
        if isinstance(self.make, str):
            module, colon, attribute = self.make.partition(":")
            if not (module and colon and attribute):
                raise ValueError(
                    f"make of stage {self.name!r} must be 'module:name', got {self.make!r}; such "
                    "as 'my_app.stages:Decoder'"
                )
        elif not callable(self.make):
            raise TypeError(
                f"make of stage {self.name!r} must be a function, a class or 'module:name', got "
                f"{self.make!r:.60}; pass what makes the stage"
            )
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(
                f"threads of stage {self.name!r} must be 1 or more, got {self.threads!r}; leave "
                "it out for an equal share"
            )
        if self.device is not None:
            torch.device(self.device)  # its own message says what is wrong
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"options of stage {self.name!r} must be plain data, got {self.options!r:.60} "
                f"({error}); give a path or a name, and load it in make"
            ) from None

    def made(self) -> Computes:
        """Make what computes.

        Raises:
            TypeError: it cannot be called.
        """
        make = _imported(self.make) if isinstance(self.make, str) else self.make
        found: Computes = make(**self.options)
        if not callable(found):
            raise TypeError(
                f"make of stage {self.name!r} must return a callable of one item, got "
                f"{found!r:.60}; give its class a __call__"
            )
        return found

    def importable(self) -> str:
        """Return `module:name` of `make`, which another process can import.

        Raises:
            TypeError: a lambda, a function inside of a function, or an object.
        """
        if isinstance(self.make, str):
            return self.make
        name = f"{getattr(self.make, '__module__', '')}:{getattr(self.make, '__qualname__', '')}"
        try:
            found = _imported(name)
        except (ImportError, AttributeError, ValueError):
            found = None
        if found is not self.make:
            raise TypeError(
                f"make of stage {self.name!r} must be importable to run in a process of its own, "
                f"got {self.make!r:.60}; define it at the top level of a module"
            )
        return name


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found
