"""Run `lipass doctor --model FAMILY --checkout PATH` in a process of its own, and print it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lipass.cli import UsageError
from lipass.errors import LipassError

SCHEMA_VERSION = 1
_WIDTH = 80


def examination(family: str | None, checkout: str | None) -> dict[str, Any]:
    """Examine the user's checkout of a family, as JSON-able data.

    Raises:
        UsageError: for a family that is not known, or a path that is no folder.
        LipassError: if the checkout cannot be imported or built.
    """
    if not family or not checkout:
        raise UsageError(
            "an examination takes --model and --checkout together, got one of them; name the "
            "family and the folder of its code"
        )
    name = family.replace("-", "_")
    if name not in (known := families()):
        shown = ", ".join(one.replace("_", "-") for one in known)
        raise UsageError(f"--model must be one of {shown}, got {family!r}; choose the nearest")
    folder = Path(checkout).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"--checkout must be a folder, got {checkout!r}; clone the model's repository and "
            "pass where it lies"
        )
    found = _in_own_process(name, folder.resolve())
    if found["error"]:
        raise LipassError(f"{checkout} must be a checkout of {family} that runs here, and raised "
                          f"{found['error']}")  # fmt: skip
    return {"schema_version": SCHEMA_VERSION, "checkout": str(folder), **found}


def families() -> list[str]:
    """List the families whose checkouts can be examined."""
    from lipass.adapters.families import FAMILIES

    return [
        name
        for name in FAMILIES
        if importlib.util.find_spec(f"lipass.adapters.checkouts.{name}") is not None
    ]


def _in_own_process(family: str, checkout: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "found.json"
        command = [sys.executable, "-m", "lipass.adapters.checkouts", family, str(checkout)]
        said = subprocess.run(
            [*command, str(answer)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        if not answer.is_file():
            last = said.stdout.strip().splitlines()[-1:] or ["nothing"]
            return {"error": f"exit code {said.returncode}, and said {last[0]}"}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Print findings for people."""
    name = found["family"].replace("_", "-")
    yield f"{name} in {found['checkout']}: a small random configuration, on the CPU"
    for check in found["checks"]:
        yield f"  {'ok  ' if check['holds'] else 'FAIL'}  {check['name']}: {check['seen']}"
    if found["stubbed"]:
        yield f"  not installed, and not needed here: {', '.join(found['stubbed'])}"
    yield ""
    yield f"adopted: {len(found['changes'])} changes"
    for title, key in (("", "changes"), ("left: ", "lints")):
        for one in found[key]:
            yield from textwrap.wrap(
                title + one, _WIDTH, initial_indent="  ", subsequent_indent="    "
            )
    yield ""
    yield "\n\n".join(part for part in found["table"].split("\n\n") if not _of_passes(part))
    yield f"({found['seconds']:.0f} s)"


def _of_passes(part: str) -> bool:
    """Whether a part of a receipt says what each pass did: long, and in the JSON document."""
    return part.startswith("pass ")
