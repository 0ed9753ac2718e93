"""Know whether anything that a session asked for has happened, and if not, why not.

A first chunk without a history has nothing to leave out and does not count. A session of less than
three others is a trial: its receipt says it, and nobody is warned.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from lipass.config import Config
from lipass.policy.plan import ChunkPlan
from lipass.receipt import ChunkRecord, current_report
from lipass.runtime.agreement import tell

_TRIAL_CHUNKS = 2
_UNSEEN = "no attention was seen in a compiled model; `lipass inspect` looks for it"
_NO_CAMERAS = "no cameras of a history were given"


class Effect:
    """What the approximations of one session have done so far.

    Attributes:
        told: whether nothing more is to be said, as after an error.
        told_whole: whether it was told that no step is taken on half of the grid.
    """

    def __init__(self, config: Config, number: int) -> None:
        self.told = self.told_whole = False
        self._config = config
        self._number = number
        self._chunks = 0
        self._did = False
        self._causes: dict[str, Counter[str]] = {"context": Counter(), "steps": Counter()}
        self._dense: Counter[str] = Counter()
        self._sparse_before, self._calls_before, _ = _counted()

    def add(self, record: ChunkRecord) -> None:
        """Note what one finished chunk did."""
        plan = record.plan
        if not plan.history_latents and not plan.index:
            return
        self._chunks += 1
        if self._config.context:
            self._note("context", _kept_all(plan, record.latents_read))
        if self._config.steps:
            self._note("steps", _computed_all(plan, record.lookups))
        if self._config.sparse and plan.dense_reason:
            self._dense[plan.dense_reason] += 1

    def state(self) -> dict[str, Any]:
        """Give the counts as plain data; `restore` takes it back."""
        sparse, calls, _ = _counted()
        return {
            "told": self.told,
            "told_whole": self.told_whole,
            "chunks": self._chunks,
            "did": self._did,
            "causes": {name: dict(counts) for name, counts in self._causes.items()},
            "dense": dict(self._dense),
            "sparse_calls": sparse - self._sparse_before,
            "calls": calls - self._calls_before,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given."""
        self.told, self._chunks, self._did = state["told"], state["chunks"], state["did"]
        self.told_whole = state.get("told_whole", False)  # older snapshots have none
        self._causes = {name: Counter(counts) for name, counts in state["causes"].items()}
        self._dense = Counter(state["dense"])
        sparse, calls, _ = _counted()
        self._sparse_before = sparse - state["sparse_calls"]
        self._calls_before = calls - state["calls"]

    def tell(self) -> None:
        """Warn once, at the end, if nothing was left out; the receipt says it too."""
        on = [name for name in ("context", "sparse", "steps") if getattr(self._config, name)]
        if self.told or self._did or not self._chunks or not on:
            return
        self.told = True
        causes = {name: counter.most_common(1)[0][0] for name, counter in self._causes.items()
                  if counter}  # fmt: skip
        if self._config.sparse:
            why = self._why_dense()
            if why is None:
                return
            causes["sparse"] = why
        said = "; ".join(f"{name}: {causes[name]}" for name in on if name in causes)
        line = f"preset {self._config.preset!r} left nothing out in {self._chunks} chunks: {said}"
        current_report().idle.append(f"session {self._number}: {line}")
        if self._chunks <= _TRIAL_CHUNKS:
            return
        tell(
            "an approximate session must leave something out to be faster, got "
            f"{line}; mend the cause, or use preset 'exact'",
            strict=False,
        )

    def _note(self, section: str, why: str | None) -> None:
        if why is None:
            self._did = True
        else:
            self._causes[section][why] += 1

    def _why_dense(self) -> str | None:
        sparse, calls, reason = _counted()
        if sparse > self._sparse_before:
            return None
        if calls == self._calls_before:
            return _why_kept() or _UNSEEN
        if why := _why_kept():
            return why
        if self._dense:
            return self._dense.most_common(1)[0][0]
        return reason or "every call stayed dense"


def _why_kept() -> str | None:
    """Say why all sites over latents were kept, or None where one was rewritten."""
    over = [site for site in current_report().sites.values() if site.role not in ("cross", "text")]
    if not over or any(site.action == "rewritten" for site in over):
        return None
    reasons = Counter(site.reason for site in over)
    return f"all attention was kept, {reasons.most_common(1)[0][0]}"


def _kept_all(plan: ChunkPlan, read: int | None) -> str | None:
    there, chosen = plan.history_latents, len(plan.context.indices)
    if there == 0:
        return _NO_CAMERAS
    if read is not None and read >= there > chosen:
        return f"the model reads all {there} latents, of which {chosen} were chosen"
    return None if chosen < there else f"short context, all of the {there} latents were kept"


def _computed_all(plan: ChunkPlan, lookups: int) -> str | None:
    if plan.history_latents == 0:
        return _NO_CAMERAS
    if plan.steps is None:
        return "no loop asked which steps to compute; use chunk.steps"
    if not plan.steps.reused:
        return "too few steps" if plan.revisit.allowed else plan.revisit.reason
    if plan.steps.form == "lookup" and not lookups:
        return "no call in a reused step was answered; call the compiled model inside the loop"
    return None


def _counted() -> tuple[int, int, str]:
    """Return sparse calls, all calls and the latest reason for a dense one, of all sites."""
    registry = sys.modules.get("lipass.kernels.registry")
    counts = registry.counted() if registry is not None else []
    reasons = [one.reason for one in counts if one.reason]
    return (
        sum(one.sparse_calls for one in counts),
        sum(one.calls for one in counts),
        reasons[-1] if reasons else "",
    )
