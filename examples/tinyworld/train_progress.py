"""What trainings say and write while they run."""

import json
import sys
from pathlib import Path
from typing import Any


def log(text: str) -> None:
    """Say a line beside what is printed."""
    print(text, file=sys.stderr, flush=True)


def bar(label: str, done: float, text: str) -> None:
    """Say how far something has come."""
    filled = int(30 * min(1.0, done))
    log(f"{label:8s} [{'#' * filled}{'.' * (30 - filled)}] {100 * done:5.1f} %  {text}")


def write(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n")
    partial.rename(path)
