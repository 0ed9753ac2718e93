"""Say which options of a compiled graph and of a session nobody reads, where the two meet.

Each option is read on one side. A graph holds what may be used, a session says what is: so a graph
may hold more than its session asks for, and presets may differ. What is told is an option that was
given on the side that does not read it, and a section that the session asks for and the graph does
not have.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Set
from dataclasses import fields
from pathlib import Path

import torch

from lipass.config import SECTIONS, Config
from lipass.errors import LipassError, LipassWarning
from lipass.options import ViewOptions
from lipass.presets import ADAPTIVE

_HERE, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
# What attention reads of a cache is compiled.
_IN_GRAPH = ("sparse", "merge")
# Of the options of sparse attention a session reads the one that holds for whole chunks.
_CHUNKWISE = ("sparse.dense_chunks",)
# A session of these promises results that its graph would change.
_EXACT = ("off", "exact")
_CAMERA = tuple(field.name for field in fields(ViewOptions) if field.name != "chunk_latents")


def differences(graph: Config, able: Set[str], session: Config) -> list[str]:
    """List what one side was told and the other silently ignores, a line each.

    Args:
        graph: what the graph was compiled with.
        able: sections that passes of its pipeline belong to.
        session: what the session was opened with.
    """
    if graph.fingerprint() == session.fingerprint():
        return []
    lines = []
    if session.sparse and "sparse" not in able:
        lines.append("sparse: on in the session, not in the graph")
    if session.merge and "merge" not in able:
        lines.append("merge: on in the session, not in the graph")
    if graph.sparse and "sparse" in able and session.preset in _EXACT and not session.sparse:
        lines.append(f"the {session.preset!r} of the session, as attention of the graph is sparse")
    if session.steps and session.steps.form == "lookup" and "steps" not in able:
        lines.append("steps: the session looks them up, the graph cannot answer")
    compiled, opened = graph.to_options(), session.to_options()
    for name in SECTIONS:
        if graph.context and name == "context" and not session.context:
            lines += _two_cameras(compiled, opened)
            continue  # the graph chooses by itself
        for option, default in ADAPTIVE[name].items():
            key = f"{name}.{option}"
            ours, theirs = compiled.get(key, "off"), opened.get(key, "off")
            in_session = name not in _IN_GRAPH or key in _CHUNKWISE
            ignored, read = (ours, theirs) if in_session else (theirs, ours)
            if ignored not in ("off", default, read) and (in_session or name in able):
                where = ("graph", "session") if in_session else ("session", "graph")
                lines.append(f"{key}: {ignored} in the {where[0]}, {read} in the {where[1]}")
    return lines


def tell(message: str, *, strict: bool) -> None:
    """Warn, or raise under `strict`.

    Raises:
        LipassError: with the message.
    """
    if strict:
        raise LipassError(f"strict: {message}")
    warnings.warn(message, LipassWarning, stacklevel=_to_the_caller())


def _to_the_caller() -> int:
    """Count the frames to the line of the user's that was running: not ours, and not torch's."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and _not_theirs(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


def _not_theirs(file: str) -> bool:
    return file.startswith((_HERE, _TORCH, "<"))


def disagreement(
    lines: list[str], preset: str, session_preset: str, *, replays: bool = False
) -> str:
    """Put lines of `differences` into one sentence; of a replay the recording has the remedy."""
    recorded = "replay with those of the recording, Session.replay(plans, config)"
    remedy = recorded if replays else "give both the same options"
    return (
        f"a compiled model and its session must have the same options, got preset {preset!r} in "
        f"the graph and {session_preset!r} in the session, of which is ignored: "
        f"{'; '.join(lines)} (a graph reads sparse.* and merge.*, a session context.*, "
        f"steps.* and {' and '.join(_CHUNKWISE)}); {remedy}"
    )


def _two_cameras(compiled: dict[str, object], opened: dict[str, object]) -> Iterator[str]:
    for option in _CAMERA:
        ours, theirs = compiled[f"context.{option}"], opened.get(f"steps.{option}")
        if theirs is not None and ours != theirs:
            yield f"{option}: {ours} in the graph, {theirs} in the session"
