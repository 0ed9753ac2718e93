"""Keep results in a file, a line a rollout, so that a run that was ended goes on where it was."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lipass.errors import LipassError
from lipass.quality.subject import Case

try:
    import fcntl
except ImportError:  # Windows has other locks; there nobody is kept out
    fcntl = None  # type: ignore[assignment]

SCHEMA_VERSION = 1
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)


class Entry(NamedTuple):
    """What was found out about one rollout.

    Attributes:
        method: how it was made.
        case: of what.
        values: figures by the names of `figures.METRICS`.
        verdict: of `verdicts.Verdict`; None for the dense model.
        shown: a picture as a data URI, "" without one.
    """

    method: str
    case: Case
    values: Mapping[str, float | None]
    verdict: str | None = None
    shown: str = ""


@dataclass
class Results:
    """The entries of one configuration, in a file that grows by a line each.

    The file is locked as long as this lives or until `close`, which leaving `with` calls too: two
    runs would each roll out what the other one does, and cut off lines of each other.

    Args:
        path: of the file; begun where it is not there.
        configuration: plain data; a file of another one is refused.

    Raises:
        LipassError: another run has the file, or it holds results of another configuration, or no
            results.
    """

    path: Path
    configuration: Mapping[str, Any]
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.configuration = json.loads(json.dumps(self.configuration))
        self._descriptor = os.open(self.path, _FLAGS, 0o666)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()  # what is raised keeps this alive
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LipassError(
                "a results file must be written by one run at a time, and another one writes "
                f"{self.path}; wait for its end, or name another --out"
            ) from None
        except OSError:
            return  # a file system without locks

    def _read(self) -> None:
        text = self.path.read_bytes()
        if not text:
            self._write(json.dumps({"schema": SCHEMA_VERSION, **self.configuration}))
            return
        whole = text[: text.rfind(b"\n") + 1]
        try:
            head, *lines = whole.decode().splitlines()
        except ValueError:
            raise self._refused("no line of text") from None
        self._check(head)
        try:
            known: dict[tuple[str, Case], Entry] = {}
            for entry in map(_entry, lines):  # two runs without locks wrote some twice
                known.setdefault((entry.method, entry.case), entry)
        except (ValueError, TypeError, KeyError):
            raise self._refused("lines that are no results") from None
        self.entries = list(known.values())
        if len(whole) < len(text):  # a line that was being written as the run ended
            os.ftruncate(self._descriptor, len(whole))

    def __contains__(self, key: tuple[str, Case]) -> bool:
        return any((one.method, one.case) == key for one in self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def add(self, entry: Entry) -> None:
        """Write an entry, for good before this returns."""
        self.entries.append(entry)
        told = {**entry._asdict(), "case": list(entry.case)}
        self._write(json.dumps(told))

    def _write(self, line: str) -> None:
        with os.fdopen(self._descriptor, "ab", closefd=False) as file:
            file.write(line.encode() + b"\n")
        os.fsync(self._descriptor)

    def _check(self, head: str) -> None:
        try:
            found = json.loads(head)
            schema = found.pop("schema")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise self._refused(f"a first line {head[:40]!r}") from None
        if schema != SCHEMA_VERSION:
            raise self._refused(f"schema {schema}")
        for key in {**self.configuration, **found}:
            mine, theirs = (one.get(key) for one in (self.configuration, found))
            if mine != theirs:
                raise self._refused(f"{key} {_short(theirs)} in place of {_short(mine)}")

    def _refused(self, what: str) -> LipassError:
        return LipassError(
            f"a results file must be of the same run, to go on with it; {self.path} has {what}; "
            "name another --out, or remove it to begin anew"
        )


def _entry(line: str) -> Entry:
    told = json.loads(line)
    return Entry(**{**told, "case": Case(*told["case"])})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
