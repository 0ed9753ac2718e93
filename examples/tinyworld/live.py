"""TinyWorld as `lipass play` serves it: rooms to walk in, compiled dense and accelerated.

A visitor enters a room that was recorded before; the recording is the memory that both sides begin
with. Keys become cameras, walls stop them, and each side goes on by itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lipass
from lipass.kernels import registry
from lipass.play.world import DENSE, Camera, Controls, Made, Pixels, Remembered, Words
from lipass.policy.context import FrameDecision

from .camera import EYE_HEIGHT_M, camera_to_world, invert, view_similarity
from .codec import Codec
from .compare import Contender, options_of
from .model import CHUNK_LATENTS, KeyValue, TinyWorld, tokenize
from .rollout import SIGMAS, chunk_noise, retrieve, run_chunk
from .train_batches import prompt_of
from .weights import load
from .world import (
    AIRS,
    HELD_OUT_SEED,
    PALETTES,
    TIMES,
    Attributes,
    Room,
    bare,
    is_free,
    make_room,
    render,
    render_walls,
)

FPS = 20.0
# A person who walks, 1.6 m/s, and turns: the slowest that the model was trained on, at this rate.
_STEP_M, _TURN_DEG, _LOOK_DEG = 1.6 / FPS, 5.0, 9
_PITCH_MAX_DEG = 15.0
# The recording is a turn on the spot where the visitor enters; more of them showed no gain.
_RECORDED = 40
# Nobody comes nearer to a wall: there is nothing to see.
_MARGIN_M = 0.7
# What a side remembers. Beyond, chunks are forgotten that show what others show too.
_HISTORY_LATENTS = 160
# What is compiled with `all` runs these too: a session says what of it is used.
_USED = {
    "all": ("context", "sparse", "steps"),
    "context": ("context",),
    "sparse": ("sparse",),
    "cache": ("steps",),
    "exact": (),
}
_LATEST_CHUNKS = 5
_EVERY_CHUNK = 1 << 30
# Contexts of several lengths, and a view that is seen again.
_WARM_UP = (Controls(ahead=1), Controls(turn=1), Controls(turn=-1))


class Stretch(NamedTuple):
    """The way of one chunk: cameras `[4, 4, 4]`, as places too, and what its walls would be."""

    w2c: Tensor
    cameras: tuple[Camera, ...]
    walls: Tensor


class LiveWorld:
    """The model, compiled with `off` and with `all`, and its rooms.

    Args:
        inner: what compiles the graphs behind the passes.
        model: model and codec, in place of the trained ones.
    """

    title = "TinyWorld"
    chunk_frames = CHUNK_LATENTS
    fps = FPS
    look = CHUNK_LATENTS * _LOOK_DEG
    words: Mapping[str, tuple[str, ...]] = {
        "time": tuple(TIMES),
        "air": tuple(AIRS),
        "light": tuple(PALETTES),
    }
    presets = tuple(_USED)
    room = HELD_OUT_SEED + 3
    rooms = 100_000

    def __init__(
        self, inner: str = "inductor", model: tuple[TinyWorld, Codec] | None = None
    ) -> None:
        self.model, self.codec = model or load()
        self.inner = inner
        self.size = (8 * self.model.config.rows, 8 * self.model.config.columns)
        self._callable: dict[str, Callable] = {}
        self._texts: dict[Words, list[KeyValue]] = {}

    def compile(self, side: str, say: Callable[[str], None]) -> None:
        """Compile both graphs of a side by calling them; then it takes the place of the model."""
        preset = "off" if side == DENSE else "all"
        say(f"compiling {preset}: a graph that reads the history, and one that denoises")
        compiled = Contender(preset, self.model, self.inner, _graph_options(preset, self.inner))
        visit = self.visit(self.room)
        made = LiveSide(self, visit, side, compiled)
        words = tuple(group[0] for group in self.words.values())
        for chunk, turn in enumerate(_WARM_UP):
            made.make(chunk, visit.go(turn), words, self.presets[0])
        made.close()
        # Graphs know by now which sizes vary; marking all tensors again took 1 ms a chunk.
        self._callable[side] = compiled.compiled

    def callable(self, side: str) -> Callable:
        """Return the model of a side, compiled if it is already."""
        return self._callable.get(side, self.model)

    def text(self, words: Words) -> list[KeyValue]:
        """Encode one word a group, once: all that can be said are few prompts."""
        if words not in self._texts:
            tokens = tokenize(prompt_of(Attributes(*words)))
            self._texts[words] = self.model.text(tokens[None])
        return self._texts[words]

    def session(self, preset: str) -> lipass.Session:
        """Open a session for the graphs that are there."""
        return lipass.Session(**_session_options(preset, self.inner))

    def visit(self, room: int) -> "LiveVisit":
        """Let somebody into the room of a seed."""
        return LiveVisit(self, room)


class LiveVisit:
    """A way through one room."""

    @torch.no_grad()
    def __init__(self, world: LiveWorld, room: int) -> None:
        self.world = world
        self.room = make_room(room)
        self._bare = bare(self.room)
        self._pitch = 0.0
        self.camera = _entrance(self.room)
        turn = (self.camera.yaw + 360 * i / _RECORDED for i in range(1 - _RECORDED, 1))
        self.recorded = self._stretch([(self.camera._replace(yaw=yaw), 0.0) for yaw in turn])
        frames = render(self.room, self.recorded.w2c, [Attributes()], world.size[0])[0]
        self.given = world.codec.encode(frames)
        self.first = pixels(frames[-1:])[0]
        self.plan = _plan(self.room)

    @torch.no_grad()
    def go(self, controls: Controls) -> Stretch:
        """Walk and look as far as a chunk goes; walls and furniture stop."""
        places = []
        for _ in range(CHUNK_LATENTS):
            self._step(controls)
            places.append((self.camera, self._pitch))
        return self._stretch(places)

    def side(self, name: str) -> "LiveSide":
        """Begin one of the sides, with the recording as its memory."""
        return LiveSide(self.world, self, name)

    def state(self) -> dict[str, Any]:
        """Give where the visitor stands and looks; rooms are made of their seeds."""
        return {"camera": list(self.camera), "pitch": self._pitch}

    def restore(self, state: dict[str, Any]) -> None:
        """Stand and look as in a `state`."""
        self.camera, self._pitch = Camera(*state["camera"]), state["pitch"]

    def _step(self, controls: Controls) -> None:
        x, z, yaw = self.camera
        yaw += controls.turn * _TURN_DEG + controls.yaw / CHUNK_LATENTS
        pitch = self._pitch + controls.pitch / CHUNK_LATENTS
        self._pitch = max(-_PITCH_MAX_DEG, min(_PITCH_MAX_DEG, pitch))
        length = math.hypot(controls.ahead, controls.aside) or 1.0
        ahead, aside = (_STEP_M * part / length for part in controls[:2])
        sin, cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        dx, dz = ahead * sin + aside * cos, ahead * cos - aside * sin
        for step_x, step_z in ((dx, dz), (dx, 0.0), (0.0, dz)):  # slide along what is in the way
            if is_free(self.room, x + step_x, z + step_z, _MARGIN_M):
                x, z = x + step_x, z + step_z
                break
        self.camera = Camera(x, z, yaw % 360)

    def _stretch(self, places: Sequence[tuple[Camera, float]]) -> Stretch:
        position = torch.tensor([[camera.x, -EYE_HEIGHT_M, camera.z] for camera, _ in places])
        yaw = torch.tensor([camera.yaw for camera, _ in places])
        pitch = torch.tensor([pitch for _, pitch in places])
        w2c = invert(camera_to_world(position, yaw, pitch))
        # Bare walls have no edges to be missed by one ray a pixel, which takes 13 ms less a chunk.
        walls = self.world.codec.encode(render_walls(self._bare, w2c, self.world.size[0]))
        return Stretch(w2c, tuple(camera for camera, _ in places), walls)


class LiveSide:
    """What one side has generated for one visitor, behind what was recorded."""

    def __init__(
        self, world: LiveWorld, visit: LiveVisit, name: str, model: Callable | None = None
    ) -> None:
        self._world, self._name, self._model = world, name, model
        self._latents = visit.given
        self._w2c, self._walls = visit.recorded.w2c, visit.recorded.walls
        self._cameras = list(visit.recorded.cameras)
        self._seed = visit.room.seed
        self._words = tuple(group[0] for group in world.words.values())
        # What each latent shows: the model is told of its memory what that was told.
        self._shown = [self._words] * len(self._latents)
        self._preset = ""
        self._session: lipass.Session | None = None

    @torch.no_grad()
    def make(self, chunk: int, stretch: Stretch, words: Words, preset: str) -> Made:
        """Generate a chunk, and remember it."""
        session = self._open("off" if self._name == DENSE else preset)
        if words != self._words:
            self._words = words
            session.steer(self._world.text(words))
        model = self._model or self._world.callable(self._name)
        history = len(self._latents)
        w2c = torch.cat([self._w2c, stretch.w2c])
        walls = torch.cat([self._walls, stretch.walls])
        shape = (1, self._latents.shape[1], CHUNK_LATENTS, *self._latents.shape[2:])
        noise = chunk_noise(self._seed, _RECORDED + chunk * CHUNK_LATENTS, shape)
        with session.chunk(
            poses=self._w2c,
            query=stretch.w2c,
            latents=self._latents,
            own_context=None if session.config.context else retrieve(self._w2c, stretch.w2c),
        ) as planned:
            before = _blocks()
            runs = groupby(planned.context, self._shown.__getitem__)
            record, x = run_chunk(
                model, planned.text, list(self._latents), w2c, walls, history, noise,
                planned.context, planned.steps(SIGMAS),
                [(self._world.text(shown), list(kept)) for shown, kept in runs],
            )  # fmt: skip
            density = _density(before, _blocks())
        new = x[0].transpose(0, 1)
        memory = [
            Remembered(camera, _kind(frame))
            for camera, frame in zip(self._cameras, planned.plan.context.frames, strict=True)
        ]
        changed = planned.plan.steering is None or planned.plan.steering.weight == 1
        self._shown += [words if changed else self._shown[-1]] * CHUNK_LATENTS
        self._remember(new, w2c, walls, stretch.cameras)
        return Made(
            pixels(self._world.codec.decode(new)),
            memory,
            record.steps_computed + planned.misses,
            len(SIGMAS) - 1,
            density,
            planned.plan.revisit.reason,
        )

    def close(self) -> None:
        """Close the session and drop the history."""
        if self._session is not None:
            self._session.close()
        self._session = None
        self._latents = self._w2c = self._walls = torch.empty(0)
        self._cameras, self._shown = [], []

    def state(self) -> dict[str, Any]:
        """Give the history, and what the session knows of it."""
        opened = self._session
        return {
            "latents": self._latents,
            "w2c": self._w2c,
            "walls": self._walls,
            "cameras": self._cameras,
            "words": self._words,
            "shown": self._shown,
            "preset": self._preset,
            "session": None if opened is None else opened.snapshot(records=False).to_tree(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the history of a `state`."""
        self._latents, self._w2c, self._walls = state["latents"], state["w2c"], state["walls"]
        self._cameras = [Camera(*camera) for camera in state["cameras"]]
        self._words = tuple(state["words"])
        self._shown = [tuple(words) for words in state["shown"]]
        self._preset = state["preset"]
        if state["session"] is not None:
            snapshot = lipass.Snapshot.from_tree(state["session"])
            options = _session_options(self._preset, self._world.inner)
            self._session = lipass.Session.resume(snapshot, **options)

    def _open(self, preset: str) -> lipass.Session:
        """Return the session; another preset goes on in another one, with the same history."""
        if self._session is None or preset != self._preset:
            before, self._session = self._session, self._world.session(preset)
            self._preset = preset
            if before is None:
                self._session.steer(self._world.text(self._words))
            else:  # how many chunks there were, and what was shown under which words
                self._session.turns.restore(before.turns.state())
                self._session.prompts.restore(before.prompts.state())
                before.close()
        return self._session

    def _remember(
        self, new: Tensor, w2c: Tensor, walls: Tensor, cameras: Sequence[Camera]
    ) -> None:
        """Put a chunk behind the history, and forget one where it is full."""
        latents = torch.cat([self._latents, new])
        everything = [*self._cameras, *cameras]
        keep = kept(w2c, _HISTORY_LATENTS)
        self._latents, self._w2c, self._walls = latents[keep], w2c[keep], walls[keep]
        self._cameras = [everything[i] for i in keep]
        self._shown = [self._shown[i] for i in keep]
        if self._session is not None and len(keep) < len(latents):
            self._session.prompts.moved(keep)


def kept(w2c: Tensor, most: int) -> list[int]:
    """Choose at most `most` latents to remember; what others show best is forgotten, by chunks.

    The recording and the latest latents stay.

    Args:
        w2c: cameras `[M, 4, 4]` of the history.
        most: a multiple of a chunk.
    """
    every = list(range(len(w2c)))
    if len(w2c) <= most:
        return every
    similarity = view_similarity(w2c, w2c)
    chunk = torch.arange(len(w2c)) // CHUNK_LATENTS
    similarity[chunk[:, None] == chunk] = 0
    shown_elsewhere = similarity.amax(1).unflatten(0, (-1, CHUNK_LATENTS)).amin(1)
    first, last = _RECORDED // CHUNK_LATENTS, len(shown_elsewhere) - _LATEST_CHUNKS
    forgotten = first + int(shown_elsewhere[first:last].argmax())
    return [i for i in every if i // CHUNK_LATENTS != forgotten]


def _graph_options(preset: str, inner: str) -> dict[str, Any]:
    """Return options of `torch.compile`: sessions choose latents and steps in front of it."""
    options = _without("context", _without("steps", options_of(preset, inner)))
    return {name: value for name, value in options.items() if not name.endswith("fov_deg")}


def _without(section: str, options: dict[str, Any]) -> dict[str, Any]:
    """Switch a section off."""
    left = {name: value for name, value in options.items() if not name.startswith(f"{section}.")}
    return left | {section: False}


def _session_options(preset: str, inner: str) -> dict[str, Any]:
    """Return options of a session that uses a part of what is compiled."""
    if preset == "off":
        return options_of("off", inner)
    used = _USED[preset]
    options = options_of("all", inner)
    for name in ("context", "steps"):
        if name not in used:
            options = _without(name, options)
    if "sparse" not in used:
        options["sparse.dense_chunks"] = _EVERY_CHUNK
    if not {"context", "steps"} & set(used):
        del options["hfov_deg"], options["vfov_deg"]
    return options


def pixels(frames: Tensor) -> Pixels:
    """Turn frames `[n, 3, P, P]` in 0..1 into `[n, P, P, 3]` bytes."""
    return (frames * 255 + 0.5).byte().permute(0, 2, 3, 1).contiguous().numpy()


def _blocks() -> tuple[int, int]:
    """Count attention blocks visited so far, and all that there were."""
    counts = registry.telemetry().values()
    return sum(one.visited_blocks for one in counts), sum(one.total_blocks for one in counts)


def _density(before: tuple[int, int], after: tuple[int, int]) -> float:
    total = after[1] - before[1]
    return (after[0] - before[0]) / total if total else 1.0


def _kind(frame: FrameDecision) -> str:
    """Name why a latent is read, by the first word of the reason."""
    return frame.reason.split()[0].strip(":") if frame.kept else "dropped"


def _plan(room: Room) -> dict[str, Any]:
    width, _, depth = room.size_m.tolist()
    boxes = [[low[0], low[2], high[0], high[2]] for low, high in room.boxes.tolist()]
    return {"size": [width, depth], "boxes": boxes}


def _entrance(room: Room) -> Camera:
    """Choose where a visitor enters: near the middle, with the longest way ahead."""
    width, _, depth = room.size_m.tolist()
    places = [(width * i / 20, depth * j / 20) for i in range(1, 20) for j in range(1, 20)]
    free = [place for place in places if is_free(room, *place, _MARGIN_M)] or places
    x, z = min(free, key=lambda place: math.dist(place, (width / 2, depth / 2)))

    def way(yaw: int) -> float:
        sin, cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        steps = (0.2 * i for i in range(1, 50))
        return next(m for m in steps if not is_free(room, x + m * sin, z + m * cos))

    return Camera(x, z, float(max(range(0, 360, 15), key=way)))
