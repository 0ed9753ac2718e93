"""Compare presets on one scenario: compile each once, roll out in turn, measure all alike.

Every contender runs the same model, noise and loop. Rollouts of one scenario alternate between the
contenders, several times, and the median counts, so that a machine that drifts drifts for all.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

import lipass
from lipass.kernels import registry

from .camera import FOV_DEG
from .codec import Codec
from .metrics import affected_psnr_db, psnr_db, self_consistency_db
from .model import CHUNK_LATENTS, KeyValue, TinyWorld
from .rollout import WINDOW_LATENTS, Rollout, roll_out
from .scenario import Scenario
from .weights import SHIPPED

INDUCTOR = "inductor"
# A latent of the small model is one tile: whole latents are read or not, and none is split. The
# four latents of a chunk choose together, since their views are nearly the same.
TILE, QUERY_TILE = (1, 8, 8), (4, 8, 8)
_STEPS = 4
# Found by `lipass calibrate` in rooms that it was trained on (`calibration.py`).
CALIBRATED = SHIPPED / "calibrated.toml"


def options_of(preset: str, inner: str) -> dict[str, Any]:
    """Flat options of a preset as calibrated for this model; reference keeps the released."""
    options: dict[str, Any] = {"preset": preset, "inner": inner}
    config = lipass.Config.resolve(None, options)
    if preset == "reference":
        return options
    if config.context or config.steps:
        options |= {"hfov_deg": FOV_DEG, "vfov_deg": FOV_DEG}
    if config.sparse:
        options |= {"sparse.tile": TILE, "sparse.query_tile": QUERY_TILE}
    found = lipass.Frontier.load(CALIBRATED).point().options
    return options | {
        key: value for key, value in found.items() if getattr(config, key.partition(".")[0])
    }


def marking_lengths(compiled: Callable) -> Callable:
    """Call a compiled model so that the context length is the one dimension that varies.

    Where early steps are on half of the grid there is a graph for each grid, of sizes of its own.
    """

    def call(
        latents: Tensor,
        sigma: Tensor,
        w2c: Tensor,
        text: list[KeyValue],
        history: list[KeyValue] | None = None,
        walls: Tensor | None = None,
    ) -> Any:
        for axis in (3, 4):
            torch._dynamo.mark_static(latents, axis)
        torch._dynamo.mark_dynamic(w2c, 1)
        if history is None:
            torch._dynamo.mark_dynamic(latents, 2)
            torch._dynamo.mark_dynamic(sigma, 1)
            if walls is not None:
                torch._dynamo.mark_dynamic(walls, 2)
        else:
            for pair in history:
                for tensor in pair:
                    torch._dynamo.mark_dynamic(tensor, 2)
        return compiled(latents, sigma, w2c, text, history, walls)

    return call


class Compared(Protocol):
    """What takes part in a comparison."""

    preset: str
    compile_s: float

    @property
    def recompiles(self) -> int:
        """Graphs that were compiled after warm-up."""

    def roll_out(self, scenario: Scenario, text: list[KeyValue]) -> "Run":
        """Roll out once."""


class Contender:
    """The model compiled with one preset, or by plain `torch.compile` under the name inductor.

    Args:
        preset: its name.
        model: the model; a copy of it is compiled.
        inner: what compiles the graphs behind the passes.
        options: in place of those of `options_of`.
        more: options beside them.
    """

    def __init__(
        self,
        preset: str,
        model: TinyWorld,
        inner: str,
        options: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.preset = preset
        own_options = options_of("off" if preset == INDUCTOR else preset, inner)
        self.options = (options or own_options) | more
        own = copy.deepcopy(model)
        if preset == INDUCTOR:
            self.compiled = torch.compile(own, backend=inner)
        else:
            self.compiled = torch.compile(own, backend="light_interaction", options=self.options)
        self.compile_s = 0.0
        self.graphs_warm = 0
        self.recompiles = 0

    def __call__(
        self,
        latents: Tensor,
        sigma: Tensor,
        w2c: Tensor,
        text: list[KeyValue],
        history: list[KeyValue] | None = None,
        walls: Tensor | None = None,
    ) -> Any:
        """Call the compiled model."""
        return marking_lengths(self.compiled)(latents, sigma, w2c, text, history, walls)

    def session(self) -> "lipass.Session | None":
        """A new session for one rollout; the exact presets need none."""
        if self.preset in (INDUCTOR, "off", "exact"):
            return None
        return lipass.Session(**self.options)

    def roll_out(self, scenario: Scenario, text: list[KeyValue]) -> "Run":
        """Roll out once."""
        registry.reset_telemetry()
        graphs = graphs_compiled()
        session = self.session()
        if session is None:
            rollout = roll_out(
                self, text, scenario.given, scenario.w2c, scenario.walls, seed=scenario.room.seed
            )
            plans: list[dict] = []
        else:
            with session:
                rollout = roll_out(
                    self, text, scenario.given, scenario.w2c, scenario.walls,
                    seed=scenario.room.seed, session=session,
                )  # fmt: skip
            chunks = [c for c in lipass.report().chunks if c.session == session.number]
            plans = [c.to_dict()["plan"] | {"done": _done(c)} for c in chunks]
        self.recompiles += graphs_compiled() - graphs
        counts = registry.telemetry().values()
        total = sum(c.total_blocks for c in counts)
        visited = sum(c.visited_blocks for c in counts)
        return Run(rollout, plans, visited / total if total else 1.0)

    def warm_up(self, scenario: Scenario, text: list[KeyValue]) -> "Run":
        """Compile, then run until nothing new is compiled; what compiles later is counted."""
        begin = time.perf_counter()
        self.roll_out(scenario, text)
        first = time.perf_counter() - begin
        run = self.roll_out(scenario, text)
        self.compile_s = max(0.0, first - run.rollout.dit_core_s)
        self.recompiles = 0
        return run


def _done(record: "lipass.receipt.ChunkRecord") -> dict[str, Any]:
    """What became of the plan of a chunk."""
    return {
        "latents_read": record.latents_read,
        "looked_up": record.lookups,
        "missed": record.misses,
    }


def graphs_compiled() -> int:
    """Graphs that this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@dataclass
class Run:
    """One rollout, the plans of its chunks and the share of attention blocks visited."""

    rollout: Rollout
    plans: list[dict]
    density: float
    frames: Tensor | None = field(default=None, repr=False)


def compare(
    contenders: Sequence[Compared],
    scenario: Scenario,
    text: list[KeyValue],
    codec: Codec,
    repeats: int,
    progress: Callable[[str], None],
) -> tuple[list[dict], dict[str, Run]]:
    """Roll out every contender `repeats` times in turn.

    Returns:
        One row a contender, in their order, with times relative to the contender called off; and
        the last run of each with its decoded frames.
    """
    seconds: dict[str, list[float]] = {c.preset: [] for c in contenders}
    runs: dict[str, Run] = {}
    for _ in range(repeats):
        for contender in contenders:
            run = contender.roll_out(scenario, text)
            seconds[contender.preset].append(run.rollout.dit_core_s)
            runs[contender.preset] = run
            progress(contender.preset)
    given = len(scenario.given)
    for run in runs.values():
        run.frames = codec.decode(run.rollout.latents)
    off, off_frames = seconds["off"], runs["off"].frames
    rows = []
    for contender in contenders:
        run, own = runs[contender.preset], seconds[contender.preset]
        chunks = run.rollout.chunks
        rows.append(
            {
                "preset": contender.preset,
                "trajectory": scenario.path,
                "regime": scenario.regime,
                "room": scenario.room.seed,
                "dit_core_s": statistics.median(own),
                "speedup_vs_off": statistics.median(a / b for a, b in zip(off, own, strict=True)),
                "psnr_vs_off_db": psnr_db(run.frames[given:], off_frames[given:]),
                "psnr_vs_off_affected_db": affected_psnr_db(
                    run.frames[given:], off_frames[given:], CHUNK_LATENTS
                ),
                "psnr_vs_truth_db": psnr_db(run.frames[given:], scenario.truth[given:]),
                "self_consistency_db": self_consistency_db(run.frames, scenario.w2c, given),
                "relative_error_vs_off": _relative(run, runs["off"], given),
                "density": run.density,
                # a reused step that found nothing stored was computed after all
                "steps_computed": sum(c.steps_computed for c in chunks)
                + sum(plan["done"]["missed"] for plan in run.plans),
                "steps_total": _STEPS * len(chunks),
                "context_latents_mean": statistics.mean(len(c.context) for c in chunks),
                "kv_bytes_peak": max(c.kv_bytes for c in chunks),
                "recompiles_after_warmup": contender.recompiles,
                "compile_s": contender.compile_s,
            }
        )
    return rows, runs


def _relative(run: Run, off: Run, given: int) -> float:
    mine, theirs = run.rollout.latents[given:], off.rollout.latents[given:]
    return float((mine - theirs).norm() / theirs.norm())


def baselines(
    scenario: Scenario, model: Callable, text: list[KeyValue], codec: Codec
) -> list[tuple[dict, Tensor]]:
    """What a viewer could have without spatial memory, or without any model: rows and frames."""
    given = len(scenario.given)
    truth = scenario.truth[given:]
    blind = roll_out(
        model, text, scenario.given, scenario.w2c, scenario.walls, seed=scenario.room.seed,
        retriever=lambda w2c, _: list(range(max(0, len(w2c) - WINDOW_LATENTS), len(w2c))),
    )  # fmt: skip
    shown = {
        "no-memory": codec.decode(blind.latents)[given:],
        "copy-last": scenario.truth[given - 1 : given].expand_as(truth),
    }
    place = {
        "trajectory": scenario.path,
        "regime": scenario.regime,
        "room": scenario.room.seed,
    }
    return [
        ({"preset": name, **place, "psnr_vs_truth_db": psnr_db(frames, truth)}, frames)
        for name, frames in shown.items()
    ]
