"""Import a checkout from its folder, without what only its helpers need.

Released code imports tokenizers, video writers and extensions at the top of the files that hold
its transformer. Nothing is installed: a package that is not here is stood in for by an empty one,
whose names are classes that may be inherited from and raise when they are made.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

# They look at import for what is installed, and must not find what stands in.
_ASK_BEFORE = ("torch", "numpy", "diffusers")


@contextmanager
def imported_from(
    checkout: Path, needed: Sequence[str] = (), holds: str = "."
) -> Iterator[list[str]]:
    """Let a checkout be imported inside the block; it stays importable behind it.

    Args:
        checkout: the folder that goes to the front of `sys.path`.
        needed: packages that the transformer itself computes with.
        holds: what lies in the folder of a checkout of this family.

    Yields:
        The packages that were stood in for, filled as they are asked for.

    Raises:
        FileNotFoundError: if the folder does not hold it.
        ModuleNotFoundError: if a needed package is missing; says how to install all that are.
    """
    if not (checkout / holds).exists():
        raise FileNotFoundError(
            f"a checkout of this family holds {holds}, and {checkout} does not; pass the folder "
            "that does"
        )
    for name in _ASK_BEFORE:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    sys.path.insert(0, str(checkout.resolve()))
    importlib.invalidate_caches()
    stand_ins = _StandIns(checkout.resolve(), needed)
    sys.meta_path.append(stand_ins)
    try:
        yield stand_ins.names
    finally:
        sys.meta_path.remove(stand_ins)


def without_its_imports(package: str, checkout: Path) -> None:
    """Let parts of a package be imported without what it imports itself, such as training."""
    made = ModuleType(package)
    made.__path__ = [str(checkout.resolve() / package)]
    sys.modules[package] = made


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find what nobody else has found, for files of a checkout: last on `sys.meta_path`."""

    def __init__(self, checkout: Path, needed: Sequence[str]) -> None:
        self.names: list[str] = []
        self._needed = needed
        self._checkout = str(checkout)

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Stand in for a package that is not installed, and for what is asked of such a one."""
        root = fullname.partition(".")[0]
        if root not in self.names:
            if fullname != root or not self._is_wanted():
                return None
            if root in self._needed:
                raise ModuleNotFoundError(_how_to_install(self._needed))
            self.names.append(root)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make an empty package."""
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing."""

    def _is_wanted(self) -> bool:
        """Whether a file of the checkout imports it, and does not provide for its absence."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None or not frame.f_code.co_filename.startswith(self._checkout):
            return False
        line = frame.f_lineno
        tree = ast.parse(Path(frame.f_code.co_filename).read_text())
        tried = [one for node in ast.walk(tree) if isinstance(node, ast.Try) for one in node.body]
        return not any(one.lineno <= line <= (one.end_lineno or line) for one in tried)


class _Empty(ModuleType):
    """A package of which every name is a class that cannot be made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": _refuse, "__module__": self.__name__})
        setattr(self, name, made)
        return made


def _how_to_install(needed: Sequence[str]) -> str:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return (
        f"the checkout computes with {', '.join(missing)}, which this Python does not have; "
        f"{sys.executable} -m pip install {' '.join(missing)}"
    )


def _refuse(self: object, *args: Any, **kwargs: Any) -> None:
    name = f"{type(self).__module__}.{type(self).__name__}"
    raise ModuleNotFoundError(f"{name} is needed here, and its package is not installed")
