"""Find out before the work whether its results can be written, and lose none that cannot."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lipass.cli import UsageError
from lipass.errors import LipassError

# A disk that takes no more than this is full for whatever comes.
_PROBE = b"\0" * (1 << 16)


def check_file(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written; nothing is left behind.

    Raises:
        UsageError: no folder to put it in, a folder itself, no permission, or a full disk.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} must name a file, got the folder {path}; write {path}/page")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"the folder of {option} must exist, got {path}; create {folder} first")
    if path.exists():
        try:
            with path.open("ab"):
                return
        except OSError as error:
            raise _unwritable(option, path, error) from None
    _probe(folder, option, path)


def check_folder(path: Path | None, option: str) -> None:
    """Refuse a folder that cannot be made or written to; what does not exist stays so.

    Raises:
        UsageError: a file is in the way, no permission, or a full disk.
    """
    if path is None:
        return
    above = path.resolve()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        what = "the file" if above == path.resolve() else "a folder below the file"
        raise UsageError(f"{option} must name a folder, got {what} {above}; name another one")
    _probe(above, option, path)


def write_all(texts: Iterable[tuple[Path, Callable[[], str]]]) -> None:
    """Write files, and say on stderr which; those behind one that fails are written too.

    Raises:
        LipassError: at the end, for the files that could not be written.
    """
    failed = []
    for path, text in texts:
        try:
            path.write_text(text(), encoding="utf-8")
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
        else:
            print(f"wrote {path}", file=sys.stderr)
    if failed:
        raise LipassError(
            f"files must be written where they were asked for, got {'; '.join(failed)}; name "
            "another path, or make room; what is printed is complete"
        )


def _probe(folder: Path, option: str, path: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(option, path, error) from None


def _unwritable(option: str, path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{option} must name what can be written, got {path}: {error.strerror}; name another "
        "path, or make room"
    )
