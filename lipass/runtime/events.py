"""Tell a server what sessions do, as events: one plain JSON object each, a line in a file.

The names and the shape follow OpenTelemetry (`docs/events.md` has the schema), so a collector or a
few lines of pandas can plot chunk times. Nothing is read from a device. What goes wrong in a sink
is told once and never reaches a rollout.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from lipass._version import VERSION
from lipass.config import Config
from lipass.policy.context import FrameDecision
from lipass.receipt import ChunkRecord, Report, current_report
from lipass.runtime.agreement import tell

log = logging.getLogger(__name__)

Sink = str | os.PathLike[str] | Callable[[dict[str, Any]], object]

SCHEMA_VERSION = 1
VARIABLE = "LIPASS_EVENTS"

# A context is bounded by its budgets, but for sessions that keep all of the history.
_INDICES_MAX = 256
_NUMBER = re.compile(r"(?:[<>=]+ *)?-?\d[\d.]* *(?:[<>=]+ *)?")


class Events:
    """Where one session writes its events, and what it has counted.

    Attributes:
        sink: where they go; None is nowhere.

    Args:
        sink: a path, to which lines are appended, or what is called with each event; None takes
            the path in LIPASS_EVENTS, if there is one.
        number: of the session.
        config: its options.

    Raises:
        TypeError: a sink that is neither.
    """

    def __init__(self, sink: Sink | None, number: int, config: Config) -> None:
        if sink is not None and not isinstance(sink, str | os.PathLike) and not callable(sink):
            raise TypeError(
                f"events must be a path or a function of one event, got {type(sink).__name__}; "
                "write Session(events='events.jsonl')"
            )
        self.sink: Sink | None = sink if sink is not None else os.environ.get(VARIABLE) or None
        self._file: int | None = None
        self._end_of_cut = b""
        self._number = number
        self._preset = config.preset
        self._begun = False
        self._began_ns = time.time_ns()
        self._chunks = self._lost = 0
        self._compiled = Compiled.now()

    def chunk(
        self,
        record: ChunkRecord,
        began_ns: int,
        compiled: Compiled,
        error: type[BaseException] | None = None,
    ) -> None:
        """Tell of a chunk that was left.

        Args:
            record: what it did.
            began_ns: when it was entered, ns since the epoch.
            compiled: what had been compiled by then.
            error: why it was left, if not because it was done.
        """
        self._chunks += error is None
        if self.sink is None and not log.isEnabledFor(logging.INFO):
            return
        attributes = chunk_attributes(record, compiled.since(), error)
        _log_chunk(record, attributes)
        self._begin()
        self._emit("lipass.chunk", began_ns, began_ns + int(record.seconds * 1e9), attributes)

    def state(self) -> dict[str, int]:
        """Give the counts; `restore` takes them back."""
        return {"chunks": self._chunks, "lost": self._lost}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where a `state` was given."""
        self._chunks, self._lost = state["chunks"], state["lost"]

    def close(self) -> None:
        """Tell of the end of the session, and close what was opened."""
        if self._begun:
            attributes = {
                "lipass.session.chunks": self._chunks,
                "lipass.session.events_lost": self._lost,
                **self._compiled.since(),
            }
            self._emit("lipass.session.end", self._began_ns, time.time_ns(), attributes)
        if self._file is not None:
            self._closing()
            self._file = None

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            attributes = {"lipass.preset": self._preset, "lipass.version": VERSION}
            self._emit("lipass.session.start", self._began_ns, self._began_ns, attributes)

    def _emit(self, name: str, start_ns: int, end_ns: int, attributes: dict[str, Any]) -> None:
        if self.sink is None:
            return
        of_all = {"process.pid": os.getpid(), "lipass.session": self._number}
        event = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "start_time_unix_nano": start_ns,
            "end_time_unix_nano": end_ns,
            "attributes": of_all | attributes,
        }
        try:
            self._write(event)
        except Exception as error:  # whatever a sink does, the rollout goes on
            self._lost += 1
            if self._lost == 1:
                tell(
                    f"the sink of a session's events must take them, got {type(error).__name__}: "
                    f"{error}; mend it, or leave events out: the rollout goes on, and events are "
                    "lost until the sink takes them",
                    strict=False,
                )

    def _write(self, event: dict[str, Any]) -> None:
        assert self.sink is not None
        if not isinstance(self.sink, str | os.PathLike):
            self.sink(event)
            return
        if self._file is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = os.open(self.sink, flags, 0o644)
            # Who leaves a session open has its file closed all the same, when it is gone.
            self._closing = weakref.finalize(self, os.close, self._file)
        # One write a line, so that processes may share a file.
        line = self._end_of_cut + (json.dumps(event) + "\n").encode()
        written = os.write(self._file, line)
        # What a full disk has cut short must not begin the next line that there is room for.
        if written:
            self._end_of_cut = b"\n" if written < len(line) else b""
        if written != len(line):
            raise OSError(f"a line of {len(line)} bytes was cut short")


class Compiled:
    """What this process had compiled at some time."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._graphs, self._recompiles = report.graphs, report.recompiles
        self._seconds = report.compile_s

    @classmethod
    def now(cls) -> Compiled:
        """Take the counts as they are."""
        return cls(current_report())

    def since(self) -> dict[str, Any]:
        """Give what was compiled since, as attributes; the report may have been reset."""
        now = current_report()
        then = self if now is self._report else Compiled(Report())
        return {
            "lipass.compile.graphs": now.graphs - then._graphs,
            "lipass.compile.recompiles": now.recompiles - then._recompiles,
            "lipass.compile.seconds": round(now.compile_s - then._seconds, 6),
        }


def chunk_attributes(
    record: ChunkRecord, compiled: dict[str, Any], error: type[BaseException] | None
) -> dict[str, Any]:
    """Put what a chunk did into attributes: numbers, words, lists, and counts by reason."""
    plan, context, steps = record.plan, record.plan.context, record.plan.steps
    kept = context.indices
    attributes: dict[str, Any] = {
        "lipass.stream": plan.stream,
        "lipass.chunk.index": plan.index,
        "lipass.chunk.finished": error is None,
        "lipass.chunk.seconds": round(record.seconds, 6),
        "lipass.context.history_latents": plan.history_latents,
        "lipass.context.kept_latents": len(kept),
        "lipass.context.dropped_latents": plan.history_latents - len(kept),
        "lipass.context.read_latents": record.latents_read,
        "lipass.context.indices": kept[:_INDICES_MAX],
        "lipass.context.kept_by": _by_reason(one for one in context.frames if one.kept),
        "lipass.context.dropped_by": _by_reason(one for one in context.frames if not one.kept),
        "lipass.context.window_chunks": context.window_chunks,
        "lipass.context.dynamics": context.dynamics,
        "lipass.revisit.allowed": plan.revisit.allowed,
        "lipass.revisit.score": plan.revisit.score,
        "lipass.revisit.reason": plan.revisit.reason,
        "lipass.sparse.dense_reason": plan.dense_reason,
        "lipass.calls.answered": record.lookups,
        "lipass.calls.missed": record.misses,
        "lipass.calls.missed_by": dict(record.why_missed),
        **compiled,
    }
    if steps is not None and error is None:
        attributes |= {
            "lipass.steps.total": steps.total,
            "lipass.steps.computed": steps.total - record.steps_skipped,
            "lipass.steps.reused": record.steps_skipped,
            "lipass.steps.form": steps.form,
            "lipass.steps.coarse": None if steps.coarse is None else record.coarse_steps,
        }
    attributes |= {"lipass.point": plan.point, "lipass.target.chunk_ms": record.target_chunk_ms}
    if (blend := plan.steering) is not None:
        attributes |= {
            "lipass.prompt.number": blend.new,
            "lipass.prompt.policy": blend.policy,
            "lipass.prompt.weight": round(blend.weight, 6),
            "lipass.prompt.chunk": blend.place,
            "lipass.prompt.chunks": blend.of,
        }
    if error is not None:
        attributes["error.type"] = error.__qualname__
    # OpenTelemetry has no null: what is not known is not there.
    return {name: value for name, value in attributes.items() if value is not None}


def _log_chunk(record: ChunkRecord, attributes: dict[str, Any]) -> None:
    log.info(
        "session %d, stream %r, chunk %d: %.3f s, chose %d of %d history latents, computed %s of "
        "%s steps, %d graphs compiled%s",
        record.session,
        record.plan.stream,
        record.plan.index,
        record.seconds,
        attributes["lipass.context.kept_latents"],
        record.plan.history_latents,
        attributes.get("lipass.steps.computed", "?"),
        attributes.get("lipass.steps.total", "?"),
        attributes["lipass.compile.graphs"],
        f", left by {attributes['error.type']}" if "error.type" in attributes else "",
    )
    if log.isEnabledFor(logging.DEBUG):
        log.debug("  steps: %s", record.plan.revisit.reason)
        for frame in record.plan.context.frames:
            log.debug("  latent %d: %s", frame.index, frame.reason)


def _by_reason(frames: Iterable[FrameDecision]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for reason, many in Counter(frame.reason for frame in frames).items():
        counts[_without_numbers(reason)] += many
    return dict(counts)


@functools.lru_cache(1024)
def _without_numbers(reason: str) -> str:
    """Make one reason of all that differ in their numbers: `dropped: overlap 0.12 < 0.30`."""
    words = reason.removeprefix("dropped: ").removeprefix("kept: ")
    return " ".join(_NUMBER.sub(" ", words).split())
