"""Keep what tries have found in a file, so that a calibration that is stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Found(NamedTuple):
    """What one choice of options did on one walk: its error, latents and steps of each chunk."""

    error: float
    chunks: tuple[tuple[int, int], ...]


class Ledger:
    """Results by options and walk, a line of JSON each.

    Args:
        path: the file, made where it is not there; None keeps nothing.
        marked: what results depend on, such as the model and the dense rollout, by walk; lines of
            something else are left alone.
    """

    def __init__(self, path: str | os.PathLike[str] | None, marked: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._marked = marked
        self._found: dict[str, Found] = {}
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                key, error, chunks = json.loads(line)
                self._found[key] = Found(error, tuple((n, steps) for n, steps in chunks))
            except (ValueError, TypeError):
                continue  # a line that was cut when the process ended

    def get(self, options: Mapping[str, Any], walk: str) -> Found | None:
        """Return what was found before, or None."""
        return self._found.get(self._key(options, walk))

    def put(
        self,
        options: Mapping[str, Any],
        walk: str,
        error: float,
        chunks: Sequence[tuple[int, int]],
    ) -> Found:
        """Keep what was found."""
        key, found = self._key(options, walk), Found(error, tuple(chunks))
        self._found[key] = found
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, error, chunks]) + "\n")
        return found

    def check(
        self, options: Mapping[str, Any], walk: str, chunks: Sequence[tuple[int, int]]
    ) -> None:
        """Forget all, in the file too, where a choice does something else now.

        The loop was changed since, or what it calls.
        """
        found = self.get(options, walk)
        if found is not None and found.chunks != tuple(chunks):
            self._found.clear()
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _key(self, options: Mapping[str, Any], walk: str) -> str:
        text = json.dumps([self._marked[walk], sorted(options.items()), walk], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]
