"""Do the parts of a calibration: dense rollouts, a cost, a search, timing."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lipass._version import VERSION
from lipass.calibration.costs import fit
from lipass.calibration.density import Density, chosen, dense, is_told, measured, visited, ways
from lipass.calibration.frontier import Cost, Point
from lipass.calibration.ladders import Ladder, Setting, ladders, nearest, options_of
from lipass.calibration.ledger import Ledger
from lipass.calibration.quality import Reference
from lipass.calibration.search import Choice, Tried, search
from lipass.calibration.subject import Run, Subject, Took
from lipass.calibration.worth import Worth, worth_of
from lipass.config import Config
from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.policy.plan import ChunkPlan
from lipass.runtime.snapshot import mark_of
from lipass.session import Session

Advance = Callable[..., None]

_DENSE: dict[str, Any] = {"preset": "off"}
# Walks that are timed: more of them say little more of time.
_TIMED_WALKS = 3
# Two dense rollouts of one walk must be so much alike.
_SAME_DB = 40.0


class Work:
    """The state of one calibration, step by step."""

    def __init__(
        self, subject: Subject, options: dict[str, Any], compiled: bool, advance: Advance
    ) -> None:
        self.subject, self.advance = subject, advance
        module = isinstance(subject.model, torch.nn.Module)
        self.mark = mark_of(subject.model) if module else {}
        self.dense = self.fast = subject.model
        self.compiles = compiled and module
        self.share({"preset": "all", **options})
        if self.compiles:
            dense = {**_DENSE, "inner": self.config.inner}
            self.dense = _compile(subject.model, dense)
        self.densities: list[Density] = []
        self.ladders: dict[str, Ladder] = {}
        self.took: list[Took] = []
        self.costed: dict[tuple[Choice, str], Run] = {}
        self.cost = Cost(1.0)
        self.again_db = self.dense_ms = 0.0

    def share(self, options: dict[str, Any]) -> None:
        """Let all points share these options from here on."""
        self.shared, self.config = options, Config.resolve(None, options)
        if self.compiles:
            self.fast = _compile(self.subject.model, self.config.to_options())

    def roll_out_dense(self) -> None:
        """Roll all walks out with the dense model, and the first one twice."""
        runs: dict[str, Run] = {}
        for walk in self.subject.walks:
            self.advance(f"dense, {walk}", done=0)
            runs[walk] = self.run(None, walk)
        self.dense_runs = runs
        self.reference = Reference({walk: run.output for walk, run in runs.items()})
        first = next(iter(runs))
        self.again_db = self.reference.db(
            self.reference.error(first, self.run(None, first).output)
        )
        if self.again_db < _SAME_DB:
            raise LipassError(
                "a rollout must be the same each time, got two of the dense model that differ, "
                f"at {self.again_db:.1f} dB; draw its noise from a seed of its own"
            )

    def choose_ladders(self) -> None:
        """Find out what may be told to sessions of this loop."""
        chunks = [one for run in self.dense_runs.values() for one in run.chunks]
        plans = [plan for run in self.dense_runs.values() for plan in run.plans]
        steps = max((one.steps.total for one in plans if one.steps is not None), default=0)
        self.ladders = ladders(self.config, max(one.latents for one in chunks), steps)
        if not self.ladders:
            raise LipassError(
                "a calibration needs options that sessions read for each chunk, got preset "
                f"{self.config.preset!r} without context and steps; use preset 'all'"
            )

    def starts(self) -> list[Choice]:
        """Begin at the options as they are, at the dearest, the cheapest and between the two."""
        own = tuple(nearest(ladder, self.config) for ladder in self.ladders.values())
        last = [len(ladder) - 1 for ladder in self.ladders.values()]
        down = (tuple(round(share * rung) for rung in last) for share in (0, 1, 1 / 3, 2 / 3))
        return [own, *down]

    def choose_density(self) -> None:
        """Let graphs attend sparsely where that pays at the dearest choice, or not at all."""
        sparse, dearest = self.config.sparse, self.starts()[1]
        if sparse is None or is_told(self.shared):
            return
        if not self.compiles:  # nothing is known of graphs that were not tried
            self.share(dense(self.shared))
            return
        tried, graphs = ways(self.shared, sparse.budget_decode), {}

        def attempt(label: str, walk: str) -> tuple[float, float, float]:
            self.advance(f"timing {label}", done=0)
            if label not in graphs:
                self.share(tried[label])
                graphs[label] = self.config, self.fast
            self.config, self.fast = graphs[label]
            registry.reset_telemetry()
            run = self.run(dearest, walk)
            db = self.reference.db(self.reference.error(walk, run.output))
            return sum(one.ms for one in run.chunks), db, visited()

        walks = list(self.subject.walks)[:_TIMED_WALKS]
        self.densities = measured(tried, walks, attempt)
        best = chosen(self.densities)
        self.shared, (self.config, self.fast) = dict(best.options), graphs[best.label]

    def fit_cost(self) -> None:
        """Time a few choices in turn, compiling first, and fit the cost to their chunks."""
        walks = list(self.subject.walks)[:_TIMED_WALKS]
        for number in range(2):
            for walk in walks:
                for choice in self.starts():
                    self.advance(f"timing {self.label(choice)}", done=0)
                    self.costed[choice, walk] = run = self.run(choice, walk)
                    self.took += run.chunks if number else ()
        self.cost = fit(self.took)

    def search(
        self, tries: int, ledger: Ledger, default_db: float, begin: Sequence[Choice]
    ) -> list[Tried]:
        """Try choices by their results, those to begin with first."""
        for (choice, walk), run in self.costed.items():
            ledger.check(self.options(choice), walk, run.decided)
        walks = list(self.subject.walks)

        def measure(choice: Choice, number: int) -> tuple[float, float]:
            walk = walks[number]
            found = ledger.get(self.options(choice), walk)
            if found is None:
                run = self.run(choice, walk)
                error = self.reference.error(walk, run.output)
                found = ledger.put(self.options(choice), walk, error, run.decided)
            ms = [self.cost.ms(*chunk) for chunk in found.chunks]
            return sum(ms) / len(ms), self.reference.db(found.error)

        def note(one: Tried) -> None:
            end = "" if one.whole else ", given up"
            self.advance(f"{self.label(one.choice)}: {one.db:.1f} dB{end}")

        rungs, begin = [len(one) for one in self.ladders.values()], [*begin, *self.starts()]
        return search(rungs, begin, len(walks), measure, tries, default_db, note)

    def timed(self, chosen: Sequence[Tried], repeats: int) -> list[Point]:
        """Roll choices out in turn with the dense model, and give those that are worth it."""
        walks = list(self.subject.walks)[:_TIMED_WALKS]
        ratios: dict[Choice, list[float]] = {one.choice: [] for one in chosen}
        took: dict[Choice | None, list[Took]] = {None: []} | {one.choice: [] for one in chosen}
        for _ in range(repeats):
            for walk in walks:
                for choice in took:
                    self.advance(f"timing {self.label(choice)}", done=0)
                    took[choice] += (run := self.run(choice, walk)).chunks
                    if choice is None:
                        dense = run
                    elif ratio := _ratio(dense.chunks, run.chunks):
                        ratios[choice].append(ratio)
        self.cost = fit([one for choice, own in took.items() if choice is not None for one in own])
        self.dense_ms = _median(took[None])
        names = self.names([one.choice for one in chosen])
        points = []
        for one, name in zip(chosen, names, strict=True):
            own = took[one.choice]
            points.append(
                Point(
                    name,
                    self.options(one.choice),
                    round(_median(own), 3),
                    round(statistics.median(ratios[one.choice] or [1.0]), 3),
                    round(one.db, 2),
                    round(min(one.dbs), 2),
                    round(statistics.mean(took.latents for took in own), 2),
                    round(statistics.mean(took.steps for took in own), 2),
                )
            )
        return points

    def worth(self, frames: int) -> list[Worth]:
        """Ask what single latents are worth to the last chunks of some walks."""
        context = self.config.context
        if context is None or not frames:
            return []
        found: list[Worth] = []
        walks = list(self.subject.walks)[:_TIMED_WALKS]
        for walk in walks:

            def error(plans: Sequence[ChunkPlan], walk: str = walk) -> float:
                self.advance(f"worth of latents, {walk}")
                run = self.subject.run(self.dense, walk, Session.replay(plans))
                return self.reference.error(walk, run.output)

            dense, scored = self.dense_runs[walk].plans, self.run(self.starts()[0], walk).plans
            count = max(frames // len(walks), 1)
            found += worth_of(walk, dense, scored[-1], context.chunk_latents, count, error)
        return found

    def run(self, choice: Choice | None, walk: str) -> Run:
        """Roll a choice out, or the dense model."""
        if choice is None:
            return self.subject.run(self.dense, walk, Session(**_DENSE))
        own = {**self.config.to_options(), **self.options(choice)}
        return self.subject.run(self.fast, walk, Session(**own))

    def chosen(self, choice: Choice) -> dict[str, Setting]:
        """Return the settings of a choice."""
        pairs = zip(self.ladders.items(), choice, strict=True)
        return {name: ladder[rung] for (name, ladder), rung in pairs}

    def options(self, choice: Choice) -> dict[str, Any]:
        """Return the flat options of a choice."""
        return options_of(self.chosen(choice))

    def label(self, choice: Choice | None) -> str:
        """Name a choice by all of its settings."""
        if choice is None:
            return "dense"
        return ", ".join(one.label for one in self.chosen(choice).values())

    def names(self, choices: Sequence[Choice]) -> list[str]:
        """Name choices by those settings in which they differ."""
        telling = [
            place for place in range(len(self.ladders)) if len({one[place] for one in choices}) > 1
        ]
        labels = [list(self.chosen(one).values()) for one in choices]
        told = [", ".join(own[place].label for place in telling) for own in labels]
        return told if telling else [self.label(one) for one in choices]

    def marked(self) -> dict[str, Any]:
        """Give what results of tries depend on, by walk."""
        # Uncompiled models attend as they do, whatever graphs would be told.
        attends = self.config.sparse if self.compiles else None
        flat = {**self.config.to_options(), "sparse": attends is not None}
        if attends is None:
            flat = {key: flat[key] for key in flat if not key.startswith("sparse.")}
        own = {
            "options": Config.resolve(None, flat).fingerprint(),
            "model": self.mark,
            "versions": [VERSION, str(torch.__version__)],
        }
        return {
            walk: own | {"dense": [list(run.output.shape), round(float(run.output.mean()), 3)]}
            for walk, run in self.dense_runs.items()
        }

    def told(self, tried: Sequence[Tried]) -> list[dict[str, Any]]:
        """Give all tries as plain data."""
        return [
            {
                "label": self.label(one.choice),
                "options": self.options(one.choice),
                "chunk_ms": round(one.time, 3),
                "db": round(one.db, 2),
                "whole": one.whole,
            }
            for one in tried
        ]


def _compile(model: Any, options: Mapping[str, Any]) -> Any:
    return torch.compile(model, backend="light_interaction", options=dict(options))


@contextlib.contextmanager
def room_for_graphs() -> Iterator[None]:
    """Let Dynamo hold graphs of a function for the dense model and ours beside each other."""
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=max(32, config.recompile_limit)):
        yield


def _ratio(dense: Sequence[Took], own: Sequence[Took]) -> float | None:
    pairs = [(a.ms, b.ms) for a, b in zip(dense, own, strict=True) if not b.compiled]
    mine = sum(b for _, b in pairs)
    return sum(a for a, _ in pairs) / mine if mine > 0 else None


def _median(chunks: Sequence[Took]) -> float:
    timed = [one.ms for one in chunks if not one.compiled]
    return statistics.median(timed or [one.ms for one in chunks])
