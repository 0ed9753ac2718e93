"""Measure what each policy makes of a changing prompt, against the renderer's new light.

    python -m benchmarks.steering --json benchmarks/results/steering.json

A room is recorded by day, and walked through again by the model; behind its first chunk the prompt
becomes another one. Geometry, cameras and noise are the same for all, so the renderer shows the
same room under the new prompt. Three things are compared with it:

- the walk under each policy,
- `settled`: the new prompt has been said before the first chunk, in a room recorded by day,
- `steady`: the room was recorded under the new prompt too, which no session that is steered has.

`jump` is the largest difference between frames on both sides of a chunk's begin while the change
goes on, over the median of such differences in the same walk by day. `objects` is how edges of the
last two chunks correlate with those of the renderer under the new prompt. Graphs run without
Inductor: pictures do not depend on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import lipass
from benchmarks.environment import environment
from lipass.examples.tinyworld.compare import Contender
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import CHUNK_LATENTS, KeyValue, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.examples.tinyworld.scenario import make_scenario
from lipass.examples.tinyworld.stream_compare import Method, StreamContender
from lipass.examples.tinyworld.stream_rollout import GrownCache, chunks_of
from lipass.examples.tinyworld.stream_walks import out_and_back
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load, load_stream
from lipass.examples.tinyworld.world import Attributes, make_room, render
from lipass.policy.steering import POLICIES, Steering

DAY = Attributes()
CHANGES = {
    "night": Attributes(time="night"),
    "fog": Attributes(air="fog"),
    "warm": Attributes(palette="warm"),
}
ROOMS = (9001, 9002, 9003)
OVER = 4
# Weights in whose chunks the pictures of a change into night differ by about as much.
EASED = (0.33, 0.55, 0.75, 1.0)
WAYS = {
    **{policy: Steering(policy=policy, over_chunks=OVER) for policy in POLICIES},
    "slerp, eased": Steering(policy="slerp", over_chunks=OVER, curve=EASED),
    "slerp, alpha 0.3": Steering(policy="slerp", over_chunks=OVER, alpha=0.3),
}
CHUNKS = 8
# Chunks by day before the change.
BEFORE = 1
WITHIN_DB = 1.0
_STREAM = {"preset": "exact", "inner": "eager", "steering": True}


class Walk(NamedTuple):
    """A way through a room whose first half is recorded, and what it shows under a prompt."""

    w2c: Tensor
    truth: Tensor
    given: Tensor
    seed: int


Said = Callable[[int, lipass.Session], None]
Texts = Callable[[Attributes], list[KeyValue]]


class Small:
    """The model that encodes its context anew for each chunk."""

    name = "small"

    def __init__(self) -> None:
        self.model, self.codec = load()
        self.called: Callable[..., Any] = self.model

    def compile(self) -> None:
        """Put the compiled model in its place, whose attention asks the session."""
        self.called = Contender("exact", self.model, "eager", steering=True)

    def walk(self, room: int, attributes: Attributes) -> Walk:
        """Record half of a walk."""
        scene = make_scenario("left/right", "explored", room, self.codec, attributes)
        return Walk(scene.w2c, scene.truth, scene.given, room)

    def frames(self, walk: Walk, session: lipass.Session, say: Said) -> Tensor:
        """Generate the other half; `say` is called in front of each chunk."""
        first = len(walk.given)
        walls = torch.zeros(len(walk.w2c), *walk.given.shape[1:])
        say(0, session)
        made = roll_out(
            self.called, None, walk.given, walk.w2c, walls, seed=walk.seed, session=session,
            progress=lambda start: say((start - first) // CHUNK_LATENTS + 1, session),
        )  # fmt: skip
        return self.codec.decode(made.latents[first:])


class OneText(Small):
    """The same, whose memory is encoded under the text of the chunk, whatever it shows."""

    def frames(self, walk: Walk, session: lipass.Session, say: Said) -> Tensor:
        """Generate the other half."""
        prompts = session.prompts
        one_run = lambda plan: [(prompts.text(plan), plan.context.indices)]  # noqa: E731
        with mock.patch.object(prompts, "memory", one_run):
            return super().frames(walk, session, say)


class Stream:
    """The model whose cache holds what each chunk left in it."""

    name = "stream"

    def __init__(self) -> None:
        self.model, self.codec = load_stream()
        self.called: Callable[..., Any] = self.model

    def compile(self) -> None:
        """Put the compiled model in its place, whose attention asks the session."""
        self.called = StreamContender(Method("exact", _STREAM), self.model, "eager")

    def walk(self, room: int, attributes: Attributes) -> Walk:
        """Record half of a walk."""
        drawn = make_room(room)
        w2c = out_and_back(drawn, 2 * CHUNKS * CHUNK_LATENTS)
        truth = render(drawn, w2c, [attributes])[0]
        given = self.codec.encode(truth[: len(w2c) // 2]).transpose(0, 1)[None]
        return Walk(w2c, truth, given, room)

    def frames(self, walk: Walk, session: lipass.Session, say: Said) -> Tensor:
        """Generate the other half; `say` is called in front of each chunk."""
        first = walk.given.shape[2] // CHUNK_LATENTS
        say(-first, session)
        made = []
        for chunk in chunks_of(
            self.called, None, walk.given, walk.w2c[None], seed=walk.seed, cache=GrownCache(),
            session=session,
        ):  # fmt: skip
            made.append(chunk.latents)
            say(chunk.start // CHUNK_LATENTS - first + 1, session)
        return self.codec.decode(torch.cat(made[first:], 2)[0].transpose(0, 1))


World = Small | Stream


def run(world: World, walk: Walk, texts: Texts, first: Attributes, said: dict[int, Any]) -> Tensor:
    """Generate a walk; `said` holds, by chunk, a prompt and how the change to it goes."""
    start = next(iter(said.values()))[1] if said else Steering()
    begun: list[bool] = []

    def say(chunk: int, session: lipass.Session) -> None:
        if not begun:
            session.steer(texts(first), policy=Steering(policy=start.policy))
            begun.append(True)
        if chunk in said:
            attributes, steering = said[chunk]
            session.steer(texts(attributes), policy=steering)

    with torch.no_grad(), lipass.Session(preset="off") as session:
        return world.frames(walk, session, say)


class Compared(NamedTuple):
    """What the walks of one change are compared with.

    Attributes:
        by_day: the walk as recorded.
        truth: what the renderer shows of the rest of it under the new prompt.
        steady: dB by chunk where all was recorded under the new prompt.
        settled: dB by chunk where it has been said before the first chunk.
        plain: median difference of frames that follow each other by day.
    """

    by_day: Walk
    truth: Tensor
    steady: list[float]
    settled: list[float]
    plain: float


def compared(world: World, room: int, texts: Texts) -> dict[str, Compared]:
    """Make what all ways are compared with, by change."""
    by_day, found = world.walk(room, DAY), {}
    plain = float(jumps(run(world, by_day, texts, DAY, {})).median())
    at_once = Steering(policy="hard")
    for name, attributes in CHANGES.items():
        new = world.walk(room, attributes)
        truth = new.truth[-CHUNKS * CHUNK_LATENTS :]
        steady = chunk_db(run(world, new, texts, attributes, {}), truth)
        settled = chunk_db(run(world, by_day, texts, DAY, {0: (attributes, at_once)}), truth)
        found[name] = Compared(by_day, truth, steady, settled, plain)
    return found


def measured(frames: Tensor, goal: Compared) -> dict[str, Any]:
    """Score a walk."""
    db, end = chunk_db(frames, goal.truth), BEFORE + OVER - 1
    return {
        "db_by_chunk": [round(x, 1) for x in db],
        "settled_by_chunk": [round(x, 1) for x in goal.settled],
        "steady_by_chunk": [round(x, 1) for x in goal.steady],
        "chunks_to_settled": reached(db, goal.settled),
        "chunks_to_steady": reached(db, goal.steady),
        "db_below_settled": round(goal.settled[end] - db[end], 2),
        "db_below_steady": round(goal.steady[end] - db[end], 2),
        "jump": round(seam(frames) / goal.plain, 2),
        "objects": round(objects(frames, goal.truth), 3),
    }


def measure(world: World, rooms: list[int], ways: dict[str, Steering]) -> list[dict[str, Any]]:
    """Measure all changes in all rooms; one row a room, change and way."""
    known: dict[Attributes, list[KeyValue]] = {}

    def texts(attributes: Attributes) -> list[KeyValue]:
        if attributes not in known:
            known[attributes] = world.model.text(tokenize(prompt_of(attributes))[None])
        return known[attributes]

    # Memory under one text is compared with what it should have become.
    goal_world = Small() if isinstance(world, OneText) else world
    goals = {room: compared(goal_world, room, texts) for room in rooms}
    rows = []
    # Texts of one length a compilation: one that varies could be a history.
    for needs in ("nothing", "one text", "two texts"):
        own = {way: steering for way, steering in ways.items() if needs_of(steering) == needs}
        torch._dynamo.reset()
        if own and needs != "nothing":
            world.compile()
        for room, (name, attributes), (way, steering) in itertools.product(
            rooms, CHANGES.items(), own.items()
        ):
            goal = goals[room][name]
            frames = run(world, goal.by_day, texts, DAY, {BEFORE: (attributes, steering)})
            row = {"model": world.name, "room": room, "change": name, "way": way}
            rows.append(row | measured(frames, goal))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def needs_of(steering: Steering) -> str:
    """Say what a change needs of attention."""
    if steering.policy == "two-prompt":
        return "two texts"
    return "one text" if steering.history_weight < 1 else "nothing"


def chunk_db(frames: Tensor, truth: Tensor) -> list[float]:
    """Score each chunk against the renderer."""
    pairs = zip(frames.split(CHUNK_LATENTS), truth.split(CHUNK_LATENTS), strict=True)
    return [psnr_db(x, y) for x, y in pairs]


def reached(db: list[float], goal: list[float]) -> int | None:
    """Count the chunks of a change until one is within `WITHIN_DB`; None where none is."""
    for chunk in range(BEFORE, len(db)):
        if db[chunk] >= goal[chunk] - WITHIN_DB:
            return chunk - BEFORE + 1
    return None


def jumps(frames: Tensor) -> Tensor:
    """Root mean square differences of frames that follow each other `[F - 1]`."""
    return (frames[1:] - frames[:-1]).square().mean((1, 2, 3)).sqrt()


def seam(frames: Tensor) -> float:
    """Return the largest jump between chunks while the change goes on."""
    begins = [chunk * CHUNK_LATENTS - 1 for chunk in range(BEFORE, BEFORE + OVER + 1)]
    return float(jumps(frames)[begins].max())


def objects(frames: Tensor, truth: Tensor) -> float:
    """Correlate edges of the last two chunks with those of the renderer, the mean over frames."""
    last = slice(-2 * CHUNK_LATENTS, None)
    pairs = zip(edges(frames[last]), edges(truth[last]), strict=True)
    return statistics.mean(
        float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]) for x, y in pairs
    )


def edges(frames: Tensor) -> Tensor:
    """Return how steep frames `[F, 3, P, P]` are, `[F, P - 1, P - 1]`."""
    grey = frames.mean(1)
    down, right = grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1]
    return (down.square() + right.square()).sqrt()


def main(argv: list[str] | None = None) -> None:
    """Print one line a walk, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rooms", type=int, nargs="+", default=list(ROOMS))
    parser.add_argument("--models", nargs="+", default=["small", "stream"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    args = parser.parse_args(argv)
    ways = {way: WAYS[way] for way in args.ways}
    rows = []
    for kind in (Small, Stream):
        if kind.name in args.models:
            # The stream takes as long for one room as the first model for three.
            rows += measure(kind(), args.rooms if kind is Small else args.rooms[:1], ways)
    if "small" in args.models and "hard" in ways:
        one_text = measure(OneText(), args.rooms, {"hard, memory under one text": WAYS["hard"]})
        rows = [*one_text, *rows]
    document = {"environment": environment(), "over_chunks": OVER, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
