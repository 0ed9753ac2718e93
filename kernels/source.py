"""Tell one state of the source code from another, for what is kept from process to process."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_SUFFIXES = {".py", ".cpp", ".h"}


@functools.cache
def source_hash(folder: Path) -> str:
    """Return a hash of the source files below a folder, as they were when it was first asked for.

    Args:
        folder: such as that of a package.
    """
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        found.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def kernels_hash() -> str:
    """Return a hash of the source of all kernels."""
    return source_hash(Path(__file__).parent)
