"""Examine a model of a family: parity, graphs, what the receipt counts against what ran, undo."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipass.adapters.adopt import adopt
from lipass.adapters.adoption import Adoption
from lipass.adapters.checkouts.subject import Check, Ran, Subject
from lipass.config import Config
from lipass.kernels import registry
from lipass.receipt import ChunkRecord, Report, report, reset_report
from lipass.session import Session

PARITY_CHUNKS, ROLLOUT_CHUNKS = 4, 5
# A rollout of four chunks and as many steps amplifies the rounding of a call.
_TOLERANCE = 1e-4
_SETTLED = 3


@dataclass(frozen=True)
class Findings:
    """What was found of one subject.

    Attributes:
        family: name of its adapter.
        checks: in order.
        changes: each name that adoption bound anew, with its place.
        lints: what it could not.
        stubbed: packages that were stood in for.
        table: the receipt of the rollout under preset `all`.
        seconds: wall time of it all.
    """

    family: str
    checks: tuple[Check, ...]
    changes: tuple[str, ...]
    lints: tuple[str, ...]
    stubbed: tuple[str, ...]
    table: str
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)


@dataclass
class _Rolled:
    """One rollout: what it gave, what the receipt says, graphs behind each chunk.

    With a session it is rolled out twice more: steps merged, then looked up; both are counted.
    """

    latents: list[Tensor]
    graphs: list[int] = field(default_factory=list)
    receipt: Report = field(default_factory=Report)
    ran: Ran = field(default_factory=lambda: Ran(0, 0))
    looked_up: Ran = field(default_factory=lambda: Ran(0, 0))


def examine(subject: Subject, *, inner: str = "eager") -> Findings:
    """Adopt a subject, roll it out under presets, and undo.

    Args:
        subject: what to examine; its model is as it was behind this.
        inner: compiler behind the passes.
    """
    began = time.perf_counter()
    with torch.no_grad():
        untouched = list(subject.rollout(subject.model, None, PARITY_CHUNKS))
        apart = subject.drive if not subject.drives_alike else None
        undriven = list(apart(PARITY_CHUNKS)) if apart else []
        adoption = adopt(subject.pipeline or subject.model)
        checks, table = [], ""
        try:
            checks.append(_parity("exact", _rolled(subject, "exact", inner), untouched))
            full = _rolled(subject, "sparse", inner, {"sparse.budget": 1.0})
            checks.append(_parity("sparse.budget 1.0", full, untouched))
            everything = _rolled(subject, "all", inner, session=True, chunks=ROLLOUT_CHUNKS)
            checks += _truths(subject, everything)
            checks.append(_bounded(everything))
            table = everything.receipt.table()
            if apart:
                checks += _driven_apart(subject, adoption, inner, undriven)
            elif subject.drive is not None:
                checks.append(_driven(subject, adoption, inner, everything.latents))
            checks += subject.more() if subject.more is not None else ()
        finally:
            adoption.undo()
            torch._dynamo.reset()
        again = list(subject.rollout(subject.model, None, PARITY_CHUNKS))
    same = all(torch.equal(a, b) for a, b in zip(untouched, again, strict=True))
    checks.append(Check("undo", same, "bit for bit" if same else "its outputs differ"))
    return Findings(
        subject.family,
        tuple(checks),
        tuple(map(str, adoption.changes)),
        tuple(map(str, adoption.lints)),
        subject.stubbed,
        table,
        time.perf_counter() - began,
    )


def options_of(subject: Subject, preset: str, **more: Any) -> dict[str, Any]:
    """Return the options of a preset and those of the subject whose section it has."""
    config = Config.resolve(preset)
    on = {name for name in ("context", "sparse", "steps") if getattr(config, name)}
    kept = {
        key: value
        for key, value in subject.options.items()
        if (key.partition(".")[0] in on if "." in key else on & {"context", "steps"})
    }
    return {"preset": preset, **kept, **more}


def _rolled(
    subject: Subject,
    preset: str,
    inner: str,
    more: Mapping[str, Any] | None = None,
    *,
    session: bool = False,
    chunks: int = PARITY_CHUNKS,
) -> _Rolled:
    torch._dynamo.reset()
    reset_report()
    registry.reset_telemetry()
    options = options_of(subject, preset, **(more or {}))
    compiled = torch.compile(
        subject.model, backend="light_interaction", options={**options, "inner": inner}
    )
    rolled = _Rolled([])
    with registry.force("sparse", "an examination takes the sparse kernel"):
        for latents in _chunks(subject, compiled, options if session else None, chunks):
            rolled.latents.append(latents)
            rolled.graphs.append(report().graphs)
        if session:
            # Only now, as compiling runs operators too.
            for form, name in (("merge", "ran"), ("lookup", "looked_up")):
                again = {**options, "steps.form": form}
                run: Callable[[], object] = functools.partial(
                    list, _chunks(subject, compiled, again, chunks)
                )
                setattr(rolled, name, counted(subject, run))
                rolled.graphs.append(report().graphs)
            rolled.receipt = report()
    return rolled


def _chunks(
    subject: Subject, model: Callable[..., Any], options: dict[str, Any] | None, chunks: int
) -> Iterator[Tensor]:
    if options is None:
        yield from subject.rollout(model, None, chunks)
        return
    with Session(**options) as session:
        yield from subject.rollout(model, session, chunks)


def counted(subject: Subject, run: Callable[[], object]) -> Ran:
    """Count calls of the model by the operators that run, whatever a receipt says."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    seen = [subject.seen(event.name, event.input_shapes) for event in profile.events()]
    took = [latents for latents in seen if latents is not None]
    return Ran(len(took), sum(took))


def _parity(name: str, rolled: _Rolled, untouched: list[Tensor]) -> Check:
    worst = max(float((a - b).abs().max()) for a, b in zip(rolled.latents, untouched, strict=True))
    return Check(
        name, worst <= _TOLERANCE, f"largest error {worst:.1e} in {len(untouched)} chunks"
    )


def _truths(subject: Subject, rolled: _Rolled) -> Iterator[Check]:
    """Check that the rollout left something out, and that the receipt counts what ran."""
    every = list(rolled.receipt.chunks)
    records, looked_up = every[-2 * ROLLOUT_CHUNKS : -ROLLOUT_CHUNKS], every[-ROLLOUT_CHUNKS:]
    finite = all(bool(one.isfinite().all()) for one in rolled.latents)
    yield Check("all: finite", finite, "yes" if finite else "no")
    if "frames" in subject.leaves_out:
        dropped = sum(_dropped(one) for one in records)
        there = sum(one.plan.history_latents for one in records)
        yield Check("all: frames dropped", dropped > 0, f"{dropped} of {there} history latents")
    if "steps" in subject.leaves_out:
        skipped = sum(one.steps_skipped for one in records)
        total = sum(one.plan.steps.total for one in records if one.plan.steps)
        yield Check("all: steps reused", skipped > 0, f"{skipped} of {total}")
    if "blocks" in subject.leaves_out:
        sparse = [one for one in rolled.receipt.sites.values() if (one.density or 1.0) < 1.0]
        lowest = min((one.density or 1.0 for one in sparse), default=1.0)
        seen = f"{len(sparse)} sites, density from {lowest:.2f}"
        yield Check("all: key blocks skipped", bool(sparse), seen)
    yield _true("all: receipt is true", subject, records, rolled.ran)
    yield _true("all: receipt is true, steps looked up", subject, looked_up, rolled.looked_up)


def _true(name: str, subject: Subject, records: list[ChunkRecord], ran: Ran) -> Check:
    said = _total(map(subject.expected, records))
    seen = (
        f"{ran.calls} calls over {ran.latents} latents ran, the receipt says {said.calls} over "
        f"{said.latents}"
    )
    return Check(name, said == ran, seen)


def _dropped(record: ChunkRecord) -> int:
    return record.plan.history_latents - len(record.plan.context.indices)


def _total(parts: Iterable[Ran]) -> Ran:
    found = list(parts)
    return Ran(sum(one.calls for one in found), sum(one.latents for one in found))


def _bounded(rolled: _Rolled) -> Check:
    settled, last = rolled.graphs[_SETTLED - 1], rolled.graphs[-1]
    left = rolled.receipt.left_eager
    seen = f"{last}, {last - settled} of them behind chunk {_SETTLED}"
    if left:
        seen += f"; not compiled: {left[0].source}"
    return Check("graphs", last == settled and not left, seen)


def _driven(subject: Subject, adoption: Adoption, inner: str, own: list[Tensor]) -> Check:
    """Check that the rollout of the release, driven, gives what the user's own loop gives."""
    options = options_of(subject, "all")
    with _compiled(subject, options, inner):
        driven = _drive(subject, adoption, ROLLOUT_CHUNKS, options)
    worst = float((torch.cat(driven, 2) - torch.cat(own, 2)).abs().max())
    return Check(
        "driven rollout", worst <= _TOLERANCE, f"largest error {worst:.1e} to the loop above"
    )


def _driven_apart(
    subject: Subject, adoption: Adoption, inner: str, undriven: list[Tensor]
) -> Iterator[Check]:
    """Check a rollout of the release against itself, and what is counted of it when driven."""
    driven = _drive(subject, adoption, len(undriven), {"preset": "off"})
    worst = max(float((a - b).abs().max()) for a, b in zip(driven, undriven, strict=True))
    seen = f"largest error {worst:.1e} to the undriven one in {len(undriven)} chunks"
    yield Check("driven rollout", worst <= _TOLERANCE, seen)
    options = options_of(subject, "all")
    with _compiled(subject, options, inner):
        run = functools.partial(_drive, subject, adoption, ROLLOUT_CHUNKS, options)
        run()  # compiling runs operators too
        ran = counted(subject, run)
    records = list(report().chunks)[-ROLLOUT_CHUNKS:]
    yield _true("driven rollout: receipt is true", subject, records, ran)


def _drive(
    subject: Subject, adoption: Adoption, chunks: int, options: Mapping[str, Any]
) -> list[Tensor]:
    assert subject.drive is not None
    with (
        registry.force("sparse", "an examination takes the sparse kernel"),
        Session(**options) as session,
        adoption.drive(session),
    ):
        return list(subject.drive(chunks))


@contextlib.contextmanager
def _compiled(subject: Subject, options: Mapping[str, Any], inner: str) -> Iterator[None]:
    """Have the model itself compiled, as a pipeline that holds it calls it."""
    torch._dynamo.reset()
    subject.model.compile(backend="light_interaction", options={**options, "inner": inner})
    try:
        yield
    finally:
        subject.model._compiled_call_impl = None
