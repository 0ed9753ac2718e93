"""The streaming world as `lipass eval` rolls it out: ways to bound its history."""

import time
from dataclasses import replace
from typing import Any

import torch

from lipass.quality import Rollout, Scene, Space
from lipass.quality.subject import Case

from .camera import FOV_DEG
from .evaluated import Scope, cases_of, latencies, settings_of
from .model import CHUNK_LATENTS
from .stream_compare import METHODS as WAYS
from .stream_compare import Run, StreamContender, Walk, make_walk, text_of
from .weights import SHIPPED, load_stream
from .world import make_room, render_depth

DENSE = "dense"
METHODS = tuple(WAYS)
REGIMES = ("explored",)
_CHUNKS = {"16 chunks": 16, "32 chunks": 32, "64 chunks": 64}
TRAJECTORIES = tuple(_CHUNKS)
_SHOWN = ("dense", "window 10", "keep-kv, 32 chunks held", "all")
_ROOMS = tuple(range(9301, 9307))
_SEED_SHIFT = 1_000_000
SCOPES = {
    "quick": Scope(_SHOWN, ("16 chunks",), REGIMES, _ROOMS[:2], (0,), "eager"),
    "main": Scope(METHODS, ("32 chunks",), REGIMES, _ROOMS[:3], (0,), "inductor"),
    "long": Scope(_SHOWN, ("64 chunks",), REGIMES, _ROOMS, (0,), "inductor"),
}


class Stream:
    """The model whose cache holds what each chunk left in it; a `lipass.quality` subject."""

    name = "stream"

    def __init__(self, scope: Scope) -> None:
        torch._dynamo.config.recompile_limit = 8 * len(METHODS)
        self.model, self.codec = load_stream()
        self.text = text_of(self.model)
        self.methods = scope.methods
        self.cases = cases_of(scope)
        self.inner = scope.inner
        self.settings: dict[str, Any] = settings_of(SHIPPED / "stream.safetensors", self.inner) | {
            "options": {name: WAYS[name].options for name in self.methods}
        }
        self._made: dict[str, StreamContender] = {}
        self._walks: dict[Case, Walk] = {}

    def scene(self, case: Case) -> Scene:
        """Render and encode the walk of a case."""
        walk = make_walk(case.room, _CHUNKS[case.trajectory], self.codec)
        depth = render_depth(make_room(case.room), walk.w2c, walk.truth.shape[-1])
        self._walks = {case: replace(walk, room=case.room + case.seed * _SEED_SHIFT)}
        return Scene(
            walk.w2c,
            len(walk.w2c) // 2,
            CHUNK_LATENTS,
            torch.cat([walk.truth.flip(0), walk.truth]),
            Space(walk.w2c, depth, FOV_DEG, FOV_DEG),
        )

    def roll_out(self, method: str, case: Case, scene: Scene) -> Rollout:
        """Roll out, compiled at the first call."""
        walk = self._walks[case]
        if method not in self._made:
            self._made[method] = StreamContender(WAYS[method], self.model, self.inner)
            self._made[method].warm_up(walk, self.text)
        contender = self._made[method]
        recompiled = contender.recompiles
        run = Run(contender, walk, self.text)
        run.finish()
        generated = run.generated
        latents = torch.cat([chunk.latents for chunk in generated], 2)
        begin = time.perf_counter()
        with torch.no_grad():
            made = run.frames(self.codec)
            decode_s = (time.perf_counter() - begin) / len(generated)
            frames = torch.cat([self.codec.decode(walk.given[0].transpose(0, 1)), made])
        seconds = [chunk.seconds for chunk in generated]
        count = len(generated)
        return Rollout(
            frames,
            latents,
            seconds,
            {
                **latencies([one + decode_s for one in seconds]),
                "kv_bytes_peak": run.kv_bytes_peak,
                "context_latents_mean": sum(len(c.context) for c in generated) / count,
                "steps_per_chunk": sum(c.steps_computed for c in generated) / count,
                "density": run.density,
                "recompiles": contender.recompiles - recompiled,
                **({} if run.kept_mass is None else {"kept_mass": run.kept_mass}),
            },
        )


subject = Stream
