"""What the receipt holds of a site, a pass and a chunk: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lipass.policy.plan import ChunkPlan


@dataclass(frozen=True)
class SiteRecord:
    """What became of one attention site.

    Attributes:
        name: site name, as in the kernels' telemetry. source: module path or file:line in the
        user's model. role: "prefill", "self", "decode", "cross", "text" or "other". grid: token
        grid of the queries (T, Y, X); entries may be symbolic ("4*n"); None if unknown. segments:
        roles of the key segments in order. action: "rewritten" or "kept". reason: why. provider:
        implementation that ran; "" before the first call. density: visited share of the key
        blocks; None before the first call. model: class of the model, `Class#2` for the second
        one of a class; "" where nobody said. calls: of it so far. dense_calls: those that a
        rewrite to sparse attention ran dense. kept_mass: share of the attention mass of sampled
        queries that the visited keys held; None where none was sampled. score_error: where a
        history is merged, root mean square of what scores have moved by, in nats, of the worst
        call. score_error_max: no score has moved by more, `|q| eps / sqrt(D)`, so no weight of
        attention has changed by more than a factor of `exp(2 score_error_max)`.
    """

    name: str
    source: str
    role: str
    grid: tuple[int | str, ...] | None
    segments: tuple[str, ...]
    action: str
    reason: str
    provider: str = ""
    density: float | None = None
    model: str = ""
    calls: int = 0
    dense_calls: int = 0
    kept_mass: float | None = None
    score_error: float | None = None
    score_error_max: float | None = None

    @property
    def ran_dense(self) -> bool:
        """Whether a rewritten site was dense in every call all the same."""
        return self.action == "rewritten" and 0 < self.calls == self.dense_calls


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph.

    Attributes:
        name: pass name.
        changed: whether the graph changed.
        seconds: time it took, verification included.
        notes: its refusals and remarks, in order.
        failure: why it was undone or left out, because it or what it requires failed; or nothing.
    """

    name: str
    changed: bool
    seconds: float
    notes: tuple[str, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class ChunkRecord:
    """What one chunk of a session did.

    Attributes:
        session: number of the session within the report.
        plan: its decisions.
        seconds: wall time between entering and leaving the chunk.
        lookups: calls answered from stored outputs.
        misses: calls of reused steps that computed all the same.
        why_missed: reasons of those, with how often.
        latents_read: most history latents that a compiled call read, whatever was planned; None
            where none was called, or it chose by itself.
        steps_skipped: denoising steps that were not computed, whatever was planned.
        preset: of the session.
        compiled: whether something was compiled meanwhile, so that `seconds` say nothing.
        target_chunk_ms: what the session was to keep; None where it has no such target.
        coarse_steps: steps that were taken on half of the grid, reused ones among them.
    """

    session: int
    plan: ChunkPlan
    seconds: float
    lookups: int
    misses: int
    why_missed: Mapping[str, int] = field(default_factory=dict)
    latents_read: int | None = None
    steps_skipped: int = 0
    preset: str = ""
    compiled: bool = False
    target_chunk_ms: float | None = None
    coarse_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Give plain data."""
        own = {"why_missed": dict(self.why_missed), "plan": self.plan.to_dict()}
        return vars(self) | own

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChunkRecord:
        """Rebuild a record from `to_dict`."""
        return cls(**{**data, "plan": ChunkPlan.from_dict(data["plan"])})
