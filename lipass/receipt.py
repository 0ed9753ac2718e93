"""Keep the receipt: what was rewritten, kept, reused and dropped, and why.

The module is not called `report` because `lipass.report` is the function.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lipass.compile.graph_breaks import GraphBreak, distinct
from lipass.records import ChunkRecord, PassRecord, SiteRecord

SCHEMA_VERSION = 1

# A chunk record holds a decision for each history latent, some 200 bytes; a session may run for
# hours, and its history grows all the time.
_CHUNKS_KEPT, _DECISIONS_KEPT = 256, 1 << 14


@dataclass
class Report:
    """What happened in this process since the last reset.

    Attributes:
        sites: attention sites by name, `model/name` where another model has a site of that name.
        passes: pass runs, in order.
        chunks: the latest chunks of all sessions, oldest first.
        chunks_forgotten: chunks before those.
        sessions: sessions opened.
        compile_s: seconds spent in passes and the inner compiler.
        graphs: graphs compiled.
        presets: what they were compiled with, each once.
        recompiles: graphs compiled again for a function that had one.
        invariants_computed: runs of what `hoist-calls` outlined, in sessions.
        invariants_kept: calls of it that were answered without a run.
        invariants_untold: runs with inputs of `torch.inference_mode`, of which torch does not tell
            whether they were written to.
        idle: sessions in which no approximation did anything, with the cause, a line each.
        graph_breaks: where Dynamo cut a function into graphs that passes see one by one.
        left_eager: functions that Dynamo runs as they are, without any graph, and why.
    """

    sites: dict[str, SiteRecord] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    chunks: deque[ChunkRecord] = field(default_factory=deque)
    chunks_forgotten: int = 0
    sessions: int = 0
    compile_s: float = 0.0
    graphs: int = 0
    presets: list[str] = field(default_factory=list)
    recompiles: int = 0
    invariants_computed: int = 0
    invariants_kept: int = 0
    invariants_untold: int = 0
    idle: list[str] = field(default_factory=list)
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    left_eager: list[GraphBreak] = field(default_factory=list)
    _decisions: int = field(default=0, repr=False)

    def add_site(self, site: SiteRecord) -> None:
        """Record a site; a later record of the same name replaces it."""
        self.sites[site.name] = site

    def add_sites(
        self, sites: Sequence[SiteRecord], model: str | None = None, part: str = ""
    ) -> str:
        """Record the sites of one graph; later ones replace those of the same model and role.

        Args:
            sites: the records.
            model: whose they are, if not that of the records.
            part: path of the module of that model whose graph it is, where it has no other name.

        Returns:
            What stands in front of their names in `sites`, and of their counts in the kernels'
            telemetry; "" where the names are free.
        """
        own = [replace(site, model=site.model if model is None else model) for site in sites]
        keys = [f"{part}/{site.name}" if part else site.name for site in own]
        held = [self.sites.get(key, site) for key, site in zip(keys, own, strict=True)]
        taken = any(a.model != b.model for a, b in zip(held, own, strict=True))
        owner = "/".join(filter(None, (own[0].model if taken else "", part)))
        for key, site in zip(keys, own, strict=True):
            self._keep(f"{own[0].model}/{key}" if taken else key, replace(site, name=key))
        return owner

    def _keep(self, key: str, site: SiteRecord) -> None:
        """Record a site; one of another role, of another graph, stays beside it.

        What is kept gives way, as no kernel counts it.
        """
        before = self.sites.get(key)
        if before is not None and before.role != site.role:
            moved = site if site.action == "kept" else before
            role = f":{moved.role}"
            self.sites[key + role] = replace(moved, name=moved.name + role)
            if moved is site:
                return
        self.sites[key] = site

    def add_pass(self, record: PassRecord) -> None:
        """Record a pass run."""
        self.passes.append(record)

    def add_graph_break(self, found: GraphBreak) -> None:
        """Record why a graph ends where it does."""
        self.graph_breaks = distinct([*self.graph_breaks, found])

    def add_graph(self, seconds: float, *, recompile: bool = False, preset: str = "") -> None:
        """Record one compiled graph and what it cost."""
        self.graphs += 1
        if preset and preset not in self.presets:
            self.presets.append(preset)
        self.recompiles += recompile
        self.compile_s += seconds

    def add_chunk(self, record: ChunkRecord) -> None:
        """Record a finished chunk; the oldest are forgotten when there are many."""
        self.chunks.append(record)
        self._decisions += record.plan.history_latents
        while len(self.chunks) > _CHUNKS_KEPT or (
            self._decisions > _DECISIONS_KEPT and len(self.chunks) > 1
        ):
            self._decisions -= self.chunks.popleft().plan.history_latents
            self.chunks_forgotten += 1

    def open_session(self) -> int:
        """Count a session and give its number."""
        self.sessions += 1
        return self.sessions

    def to_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "sites": [asdict(site) for site in self.sites.values()],
            "passes": [asdict(record) for record in self.passes],
            "chunks": [record.to_dict() for record in self.chunks],
            "chunks_forgotten": self.chunks_forgotten,
            "sessions": self.sessions,
            "compile_s": self.compile_s,
            "graphs": self.graphs,
            "presets": list(self.presets),
            "recompiles": self.recompiles,
            "invariants_computed": self.invariants_computed,
            "invariants_kept": self.invariants_kept,
            "invariants_untold": self.invariants_untold,
            "idle": list(self.idle),
            "graph_breaks": [asdict(found) for found in self.graph_breaks],
            "left_eager": [asdict(found) for found in self.left_eager],
        }

    def to_json(self) -> str:
        """Give the report as one JSON document."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> str:
        """Give the report as text of at most 80 columns."""
        from lipass.receipt_table import render

        return render(self)


_report = Report()


def current_report() -> Report:
    """Give the live report of this process, for those who record into it."""
    return _report


def reset_report() -> None:
    """Start an empty report; sessions that are open keep their numbers."""
    global _report
    _report = Report()


def report() -> Report:
    """Give the report with what the kernels counted filled in.

    Reads the kernels' counters from the device, so not for the hot loop.
    """
    live = current_report()
    sites = {key: _measured(key, site) for key, site in live.sites.items()}
    return replace(live, sites=sites, passes=list(live.passes), chunks=deque(live.chunks))


def _measured(key: str, site: SiteRecord) -> SiteRecord:
    # Not imported here: a report must not be what loads the kernels.
    registry = sys.modules.get("lipass.kernels.registry")
    counts = registry.telemetry().get(key) if registry is not None else None
    if counts is None or not counts.calls:
        return site
    reason, calls = site.reason, counts.calls
    if counts.dense_calls:
        reason += f"; {counts.dense_calls} of {calls} calls dense: {counts.reason}"
    if counts.kept_plans:
        reason += f"; blocks chosen in {counts.sparse_calls - counts.kept_plans} of {calls} calls"
    # Attention over keys in pieces is dense by design.
    dense = 0 if counts.role == "dense" else counts.dense_calls
    measured = replace(site, provider=counts.provider, density=counts.density, reason=reason)
    measured = replace(measured, calls=calls, dense_calls=dense, kept_mass=counts.mass)
    if counts.score_errors is None:
        return measured
    most, mean = (round(float(one), 4) for one in counts.score_errors)
    return replace(measured, score_error=mean, score_error_max=most)
