"""Say what went wrong on one line, so that nothing of it is lost and no traceback is needed."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from lipass.errors import LipassError

# Dynamo's errors hold a listing of the user's code and of its own state.
_LISTING = re.compile(r"\n\s*(?:Developer debug context|from user code|Set TORCHDYNAMO_VERBOSE)")
_LONGEST = 700
# Where the three layers lie, which are installed under one name and edited in three folders.
_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / name) for name in ("lipass", "passes", "kernels"))


def raised(error: BaseException) -> str:
    """Say what was raised and where, on one line."""
    while (cause := getattr(error, "inner_exception", None)) is not None:
        error = cause  # what Dynamo wraps
    if isinstance(error, SystemExit):
        return f"left the process{_where(error)} with exit code {error.code!r}"
    return f"raised {type(error).__name__}{_where(error)}: {_message(error)}"


@contextlib.contextmanager
def failing(rule: str, text: str) -> Iterator[None]:
    """Turn whatever code of the user raises into one `LipassError`, an exit included.

    Args:
        rule: what must hold, such as "must run".
        text: who must.

    Raises:
        LipassError: what was raised; the cause is chained.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise LipassError(f"{text} {rule}, and {raised(error)}") from error


def _where(error: BaseException) -> str:
    """Name the line of the user's that is nearest to what raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if not _is_library(frame.filename)]
    own = foreign or [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _is_library(filename: str) -> bool:
    return filename.startswith(("<", *_OURS)) or any(
        part in filename for part in ("site-packages", "dist-packages", "importlib", "contextlib")
    )


def _message(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = _LISTING.split(text)[0]
    joined = " ".join(text.split())
    if len(joined) <= _LONGEST:
        return joined or "without a message"
    return f"{joined[:_LONGEST].rpartition(' ')[0]} .. (--debug shows the rest)"
