"""Import the callable that a target names, as running its file would."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lipass.cli import UsageError
from lipass.cli.failures import failing, raised
from lipass.errors import LipassError


def import_callable(text: str) -> Callable[[], Any]:
    """Import the callable of a target; what it prints meanwhile goes to stderr.

    Raises:
        UsageError: for a target that does not exist.
        LipassError: for one whose code raises.
    """
    where, found, name = text.rpartition(":")
    if not found or not where or not name:
        raise UsageError(
            f"TARGET must be module:callable or file.py:callable, got {text!r}; "
            "try my_model.py:build"
        )
    with contextlib.redirect_stdout(sys.stderr):  # a JSON document may follow
        module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    build: Any = module
    for part in name.split("."):
        build = getattr(build, part, None)
    if not callable(build):
        others = [key for key, value in vars(module).items() if _is_own(value, module)]
        remedy = f"it defines {', '.join(others[:8])}" if others else "it defines no function"
        raise UsageError(
            f"{where} must define the callable {name!r}, and does not; {remedy}; see --help"
        )
    built: Callable[[], Any] = build
    return built


def _is_own(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"the file of TARGET must exist, got {str(path)!r}; check the path")
    path = path.resolve()
    root, name = _package_of(path)
    # What stands beside the file can be imported, as when Python runs it.
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if "." in name:
        with failing("must be importable", str(path)):
            return importlib.import_module(name)
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) != str(path):
        name += "_of_target"  # a module of that name is in use, such as `types`
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with failing("must be importable", str(path)):
            spec.loader.exec_module(module)
    except LipassError:
        del sys.modules[name]
        raise
    return module


def _package_of(path: Path) -> tuple[Path, str]:
    """Return the folder that a file is imported from, and its name there."""
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"the module of TARGET must be importable, got {error}") from error
    except (Exception, SystemExit) as error:
        raise LipassError(f"{name} must be importable, and {raised(error)}") from error
