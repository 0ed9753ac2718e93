"""The model of `own_model.py` as a world to walk in: `lipass play examples/own_world.py:OwnWorld`.

Its weights are random, so there is nothing to see but noise that follows the keys; it is here to
be copied. What a world has to have is said in `lipass/play/world.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import lipass
from lipass.examples import own_model
from lipass.examples.own_model import CHANNELS, CHUNK_LATENTS, OPTIONS, SIGMAS
from lipass.play.world import DENSE, Camera, Made, Remembered

STEP_M, TURN_DEG, REMEMBERED = 0.1, 5.0, 64


class OwnWorld:
    """The model, compiled both ways; it has no words and one place."""

    title, chunk_frames, fps, look = "a model of one's own", CHUNK_LATENTS, 12.0, 40
    presets, room, rooms = ("all",), 0, 1
    words: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, inner="inductor"):
        torch.manual_seed(0)
        self.inner, self.size = inner, (own_model.ROWS, own_model.COLUMNS)
        self.model = own_model.World().eval()
        self.callable = {}  # by side; the model as it is until something is compiled

    def compile(self, side, say):
        """Compile one side, by generating a few chunks."""
        options: dict[str, Any] = {"preset": "off"} if side == DENSE else OPTIONS
        say(f"compiling {options['preset']}")
        compiled = torch.compile(
            self.model, backend="light_interaction", options={**options, "inner": self.inner}
        )
        own_model.roll_out(compiled, torch.eye(4).expand(16, 4, 4), lipass.Session(**options))
        self.callable[side] = compiled

    def visit(self, room):
        """Let somebody in."""
        return Visit(self)


class Visit:
    """Where a visitor is."""

    camera = Camera(0.0, 0.0, 0.0)
    plan: Mapping[str, Any] = {}  # without a map

    def __init__(self, world):
        self.world = world
        self.first = np.zeros((*world.size, 3), np.uint8)

    def go(self, controls):
        """Turn keys into cameras `[4, 4, 4]`, world to camera, and their places."""
        places, poses = [], []
        for _ in range(CHUNK_LATENTS):
            x, z, yaw = self.camera
            yaw += controls.turn * TURN_DEG + controls.yaw / CHUNK_LATENTS
            sin, cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
            ahead, aside = STEP_M * controls.ahead, STEP_M * controls.aside
            self.camera = Camera(x + ahead * sin + aside * cos, z + ahead * cos - aside * sin, yaw)
            pose = torch.eye(4)
            pose[:3, :3] = torch.tensor([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
            pose[:3, 3] = -pose[:3, :3] @ torch.tensor([self.camera.x, 0, self.camera.z])
            places.append(self.camera)
            poses.append(pose)
        return torch.stack(poses), places

    def side(self, name):
        """Begin a side."""
        return Side(self.world, name)


class Side:
    """What one side has generated: the loop of `own_model.roll_out`, a chunk at a time."""

    def __init__(self, world, name):
        self.world, self.name = world, name
        self.session = lipass.Session(**({"preset": "off"} if name == DENSE else OPTIONS))
        self.history = torch.zeros(1, CHANNELS, 0, *world.size)
        self.w2c, self.cameras = torch.zeros(0, 4, 4), []

    @torch.no_grad()
    def make(self, chunk, stretch, words, preset):
        """Generate a chunk."""
        model = self.world.callable.get(self.name, self.world.model)
        new, places = stretch
        noise = torch.Generator().manual_seed(chunk)  # the same on both sides
        x = torch.randn(1, CHANNELS, len(new), *self.world.size, generator=noise)
        past = len(self.w2c) > 0
        with self.session.chunk(
            poses=self.w2c if past else None,
            query=new,
            latents=self.history[0].transpose(0, 1) if past else None,
        ) as planned:
            keep, caches, computed = planned.context, None, 0
            if keep:
                _, caches = model(self.history[:, :, keep], torch.zeros(1), self.w2c[None, keep])
            for step in planned.steps(SIGMAS):
                velocity, _ = model(x, step.sigma, new[None], caches)
                x = x + (step.sigma_next - step.sigma) * velocity
                computed += 1
        kinds = [f.reason.split()[0] if f.kept else "dropped" for f in planned.plan.context.frames]
        memory = [Remembered(*one) for one in zip(self.cameras, kinds, strict=True)]
        # The oldest are forgotten, so that a visit may last for hours.
        self.history = torch.cat([self.history, x], 2)[:, :, -REMEMBERED:]
        self.w2c = torch.cat([self.w2c, new])[-REMEMBERED:]
        self.cameras = [*self.cameras, *places][-REMEMBERED:]
        shown = (x[0, :3].permute(1, 2, 3, 0) * 40 + 128).clamp(0, 255).byte()
        why = planned.plan.revisit.reason
        return Made(shown.numpy(), memory, computed, len(SIGMAS) - 1, why=why)

    def close(self):
        """Free all of it."""
        self.session.close()
        self.history = self.w2c = torch.zeros(0)
