"""A world without a model, and a visitor's socket in Python."""

import json
import time
from types import MappingProxyType

import numpy as np
from websockets.sync.client import connect

from lipass.play.protocol import unpack
from lipass.play.world import DENSE, Camera, Made, Remembered


class PaintedWorld:
    """Paints the camera: red is x, green is z, blue is the heading; the dense side is darker."""

    title = "painted"
    chunk_frames, size, fps, look = 2, (4, 6), 200.0, 30
    words = MappingProxyType({"time": ("day", "night"), "air": ("clear", "fog")})
    presets = ("all", "exact")
    room, rooms = 7, 100

    def __init__(self, seconds=0.0, dense_seconds=0.0, fails_at=None):
        self.seconds = {"fast": seconds, "dense": dense_seconds}
        self.fails_at = fails_at
        self.open_sides = 0
        self.made = []

    def compile(self, side, say):
        say(f"compiling {side}")

    def visit(self, room):
        return PaintedVisit(self, room)


class PaintedVisit:
    def __init__(self, world, room):
        self.world, self.room = world, room
        self.camera = Camera(1.0, 1.0, 0.0)
        self.plan = {"size": [5.0, 4.0], "boxes": []}
        self.first = np.zeros((*world.size, 3), np.uint8)

    def state(self):
        return list(self.camera)

    def restore(self, state):
        self.camera = Camera(*state)

    def go(self, controls):
        x, z, yaw = self.camera
        turned = yaw + 10 * controls.turn + controls.yaw
        self.camera = Camera(x + controls.aside, z + controls.ahead, turned % 360)
        return self.camera

    def side(self, name):
        self.world.open_sides += 1
        return PaintedSide(self.world, self.room, name)


class PaintedSide:
    def __init__(self, world, room, name):
        self.world, self.room, self.name = world, room, name
        self.seen = []

    def make(self, chunk, stretch, words, preset):
        time.sleep(self.world.seconds[self.name])
        if self.world.fails_at == (self.room, chunk):
            raise RuntimeError("this room has no floor")
        self.world.made.append((self.name, self.room, chunk, words, preset))
        colour = np.array([stretch.x, stretch.z, stretch.yaw]) * (0.5 if self.name == DENSE else 1)
        frames = np.broadcast_to(colour.astype(np.uint8), (2, *self.world.size, 3))
        memory = [Remembered(camera, "window") for camera in self.seen]
        self.seen = [*self.seen, stretch][-8:]
        return Made(np.ascontiguousarray(frames), memory, 2, 4)

    def state(self):
        return [list(camera) for camera in self.seen]

    def restore(self, state):
        self.seen = [Camera(*camera) for camera in state]

    def close(self):
        self.world.open_sides -= 1


class Client:
    """A visitor; `until` reads on to a message that fits."""

    def __init__(self, port, **options):
        origin = options.pop("origin", f"http://127.0.0.1:{port}")
        self._opened = connect(
            f"ws://127.0.0.1:{port}/socket",
            origin=origin,
            max_size=None,
            close_timeout=1,
            **options,
        )
        self.socket = self._opened.__enter__()

    def send(self, **message):
        self.socket.send(json.dumps(message))

    def enter(self, **more):
        self.send(do="enter", **more)
        return self.until(do="welcome")

    def move(self, number=1, **controls):
        self.send(do="move", number=number, **controls)

    def receive(self, seconds=5.0):
        """Return the next message as a dict; a chunk has its pixels as `frames`."""
        data = self.socket.recv(timeout=seconds)
        if isinstance(data, str):
            return json.loads(data)
        header, pixels = unpack(data)
        header["frames"] = np.frombuffer(pixels, np.uint8).reshape(*header["shape"], 3)
        return header

    def until(self, seconds=5.0, **wanted):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = self.receive(end - time.monotonic())
            if all(message.get(key) == value for key, value in wanted.items()):
                return message
        raise TimeoutError(f"nothing like {wanted}")

    def close(self):
        self._opened.__exit__(None, None, None)
