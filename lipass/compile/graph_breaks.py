"""Say where Dynamo cut a function into graphs, why, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REMEDY = "move what breaks the graph out of forward, or compile the part without it"
# Dynamo names the jump that it compiles such a branch to, and no more.
_JUMP = "generic_jump"
_BRANCH = "Data-dependent branching: Python takes a branch by the value of a tensor"
_CHOOSE = "compute both sides and choose with `torch.where`, or decide in front of the call"
# Dynamo goes back from where it stopped to where it can leave, and forgets why.
_STEP = "step_unsupported"
_EARLIER = "Dynamo stopped behind this line, where it cannot go on, and leaves the graph here"
_ASK = "TORCH_LOGS=graph_breaks prints where it stopped and why"


@dataclass(frozen=True)
class GraphBreak:
    """One place."""

    source: str
    """`file.py:line`."""
    reason: str
    remedy: str


def break_of(found: Any) -> GraphBreak:
    """Read Dynamo's reason, a paragraph with an explanation and hints."""
    frame = found.user_stack[-1] if found.user_stack else None
    source = f"{Path(frame.filename).name}:{frame.lineno}" if frame else ""
    if str(found.reason).startswith(_JUMP):
        return GraphBreak(source, _BRANCH, _CHOOSE)
    if str(found.reason) == _STEP:
        return GraphBreak(source, _EARLIER, _ASK)
    return GraphBreak(source, *parts_of(str(found.reason)))


def parts_of(text: str) -> tuple[str, str]:
    """Return the reason and the remedy in a paragraph of Dynamo."""
    lines = [line.strip() for line in text.splitlines()]
    parts: dict[str, list[str]] = {"Explanation": [], "Hint": []}
    for line in lines:
        key, colon, rest = line.partition(":")
        if colon and key in parts:
            parts[key].append(rest.strip())
    reason = lines[0] if lines else "unknown"
    if parts["Explanation"]:
        reason += f": {parts['Explanation'][0]}"
    remedy = " ".join(parts["Hint"]) or _REMEDY
    return re.sub(r"\s+", " ", reason), re.sub(r"\s+", " ", remedy)


def distinct(breaks: Iterable[GraphBreak]) -> list[GraphBreak]:
    """Keep one break of each kind and line: Dynamo explains some at the first sight only."""
    once: dict[tuple[str, str], GraphBreak] = {}
    for one in breaks:
        once.setdefault((one.source, one.reason.partition(":")[0]), one)
    return list(once.values())
