"""TinyWorld as `lipass eval` rolls it out: presets and rivals, on walks through held-out rooms."""

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lipass
from lipass.kernels import registry
from lipass.quality import Rollout, Scene, Space
from lipass.quality.subject import Case

from .camera import FOV_DEG
from .compare import Compared, Contender, Run, options_of
from .hard_scenes import LONG, TRAJECTORIES, scene_of
from .model import CHUNK_LATENTS, tokenize
from .rivals import RIVALS, rivals
from .scenario import PATHS, REGIMES, Scenario
from .train_batches import prompt_of
from .weights import CODEC, SHIPPED, load
from .world import render_depth

DENSE = "off"
PRESETS = ("off", "exact", "context", "sparse", "cache", "all", "reference")
METHODS = (*PRESETS, *RIVALS)
# The noise of another seed; rooms have seeds far below.
_SEED_SHIFT = 1_000_000
_WARM_CHUNKS = 3


@dataclass(frozen=True)
class Scope:
    """What an evaluation of one name covers."""

    methods: tuple[str, ...]
    trajectories: tuple[str, ...]
    regimes: tuple[str, ...]
    rooms: tuple[int, ...]
    seeds: tuple[int, ...]
    inner: str


# Rooms that no option was chosen in, and no other table is of.
SCOPES = {
    "quick": Scope(
        ("off", "all", "reference", *RIVALS), PATHS, REGIMES, (9301,), (0,), "eager",
    ),
    "main": Scope(METHODS, PATHS, REGIMES, (9301, 9302, 9303), (0,), "inductor"),
    "long": Scope(
        ("off", "all", "reference", *RIVALS), (LONG,), ("explored",), tuple(range(9301, 9307)),
        (0,), "inductor",
    ),
}  # fmt: skip


class Small:
    """The model that encodes its memory anew for each chunk; a `lipass.quality` subject."""

    name = "small"

    def __init__(self, scope: Scope) -> None:
        torch._dynamo.config.recompile_limit = 4 * len(METHODS)
        self.model, self.codec = load()
        self.methods = scope.methods
        self.cases = cases_of(scope)
        self.inner = scope.inner
        self.settings = settings_of(SHIPPED / "small.safetensors", self.inner) | {
            "options": {
                name: options_of(name, self.inner) for name in self.methods if name in PRESETS
            },
        }
        self._made: dict[str, Compared] = {}
        self._scenarios: dict[Case, Scenario] = {}

    def scene(self, case: Case) -> Scene:
        """Render and encode the scene of a case."""
        scenario = scene_of(case.trajectory, case.regime, case.room, self.codec)
        noise = replace(scenario.room, seed=scenario.room.seed + case.seed * _SEED_SHIFT)
        scenario = replace(scenario, room=noise)
        self._scenarios = {case: scenario}
        depth = render_depth(scenario.room, scenario.w2c, scenario.truth.shape[-1])
        return Scene(
            scenario.w2c,
            len(scenario.given),
            CHUNK_LATENTS,
            scenario.truth,
            Space(scenario.w2c, depth, FOV_DEG, FOV_DEG),
        )

    def run(self, method: str, case: Case) -> Run:
        """Roll out the case whose scene was asked for last."""
        self._compile(method, case)
        return self._run(method, case, self._text(case))

    def _run(self, method: str, case: Case, text: Any) -> Run:
        registry.reset_telemetry()
        with torch.no_grad():
            return self._made[method].roll_out(self._scenarios[case], text)

    def roll_out(self, method: str, case: Case, scene: Scene) -> Rollout:
        """Roll out and decode."""
        self._compile(method, case)
        text = self._text(case)  # a prompt is there before an action comes
        recompiled = self._made[method].recompiles
        begin = time.perf_counter()
        run = self._run(method, case, text)
        middle = time.perf_counter()
        with torch.no_grad():
            frames = self.codec.decode(run.rollout.latents)
        end = time.perf_counter()
        chunks = run.rollout.chunks
        seconds = [chunk.prefill_s + chunk.denoise_s for chunk in chunks]
        # Planning and decoding, which a chunk waits for beside the model, are alike for all.
        beside = (middle - begin - sum(seconds)) / len(chunks)
        beside += (end - middle) / len(frames) * CHUNK_LATENTS
        missed = sum(plan["done"]["missed"] for plan in run.plans)
        return Rollout(
            frames,
            run.rollout.latents[scene.given :],
            seconds,
            {
                **latencies([one + beside for one in seconds]),
                "kv_bytes_peak": max(chunk.kv_bytes for chunk in chunks),
                "context_latents_mean": sum(len(c.context) for c in chunks) / len(chunks),
                "steps_per_chunk": (sum(c.steps_computed for c in chunks) + missed) / len(chunks),
                "density": run.density,
                "recompiles": self._made[method].recompiles - recompiled,
                **kept_mass(),
            },
        )

    def _compile(self, method: str, case: Case) -> None:
        """Compile a preset when it is first asked for; loops run what `off` has compiled."""
        preset = method if method in PRESETS else DENSE
        if preset in self._made:
            return
        made = Contender(preset, self.model, self.inner)
        self._made[preset] = made
        if preset == DENSE:
            self._made |= {loop.preset: loop for loop in rivals(made)}
        scenario = self._scenarios[case]
        frames = len(scenario.given) + _WARM_CHUNKS * CHUNK_LATENTS
        short = replace(scenario, w2c=scenario.w2c[:frames], walls=scenario.walls[:frames])
        with torch.no_grad():
            made.warm_up(short, self._text(case))

    def _text(self, case: Case) -> Any:
        prompt = prompt_of(self._scenarios[case].attributes)
        with torch.no_grad():
            return self.model.text(tokenize(prompt)[None])


def cases_of(scope: Scope) -> list[Case]:
    """List the walks of a scope, room by room."""
    return [
        Case(trajectory, regime, room, seed)
        for room, seed, regime, trajectory in itertools.product(
            scope.rooms, scope.seeds, scope.regimes, scope.trajectories
        )
    ]


def settings_of(weights: Path, inner: str) -> dict[str, Any]:
    """Say what results depend on beside methods and walks."""
    return {
        "inner": inner,
        "threads": torch.get_num_threads(),
        "weights": _checksum(weights),
        "codec": _checksum(CODEC),
        "versions": {"lipass": lipass.__version__, "torch": metadata.version("torch")},
    }


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Seconds from an action to its frames: plan, model and decoder of a chunk."""
    many = torch.tensor(seconds, dtype=torch.float64)
    return {
        "latency_s_p50": float(many.quantile(0.5)),
        "latency_s_p95": float(many.quantile(0.95)),
    }


def kept_mass() -> dict[str, float]:
    """Attention that visited keys held, of queries that were sampled since the last rollout."""
    counts = list(registry.telemetry().values())
    samples = sum(one.mass_samples for one in counts)
    return {"kept_mass": sum(one.kept_mass for one in counts) / samples} if samples else {}


subject = Small
__all__ = ["DENSE", "METHODS", "REGIMES", "SCOPES", "TRAJECTORIES", "subject"]
