"""The main job: roll TinyWorld out under several presets and write down what it cost and saved."""

import dataclasses
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lipass
from lipass.cli.progress import progress

from .camera import invert
from .compare import INDUCTOR, Contender, Run, baselines, compare
from .model import CHUNK_LATENTS, tokenize
from .report import mp4_left_out, table, write_report
from .report.pictures import side_by_side
from .rivals import RIVALS, rivals
from .scenario import PATHS, Scenario, make_scenario
from .train_batches import prompt_of
from .weights import load
from .world import Room

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Scope:
    """What a demo of one name covers."""

    presets: tuple[str, ...]
    scenarios: tuple[tuple[str, str], ...]
    rooms: tuple[int, ...]
    repeats: int
    inner: str
    with_baselines: bool
    with_rivals: bool = False


_EXPLORED = tuple((path, "explored") for path in PATHS)
_FREE = tuple((path, "free") for path in PATHS)
SCOPES = {
    "quick": Scope(("off", "all"), (("left/right", "explored"),), (9001,), 1, "eager", False),
    "main": Scope(
        ("off", "all"), (("left/right", "explored"),), (9001,), 3, "inductor", True,
    ),
    "full": Scope(
        (INDUCTOR, "off", "exact", "context", "sparse", "cache", "all", "reference"),
        _EXPLORED + _FREE, (9001, 9002), 3, "inductor", True, True,
    ),
}  # fmt: skip
# What is made once a machine: the CPU kernel and the fonts of the report.
_ONCE = "import lipass.kernels as kernels; kernels.prepare(); import matplotlib.font_manager"


def run(
    *, scope: str, presets: tuple[str, ...], out: Path, as_json: bool, threads: int | None
) -> int:
    """Run the demo of a scope, with presets beside those that it has; `lipass demo` calls this."""
    if threads is not None:
        torch.set_num_threads(threads)
    job = SCOPES[scope]
    everything = SCOPES["full"].presets
    asked = {*job.presets, *presets}
    job = dataclasses.replace(job, presets=tuple(one for one in everything if one in asked))
    # Every preset compiles the same forward; each is one entry a role in that function's cache.
    torch._dynamo.config.recompile_limit = 4 * len(everything)
    begin = time.perf_counter()
    subprocess.Popen([sys.executable, "-P", "-c", _ONCE], stderr=subprocess.DEVNULL)
    model, codec = load()
    scenes = [
        make_scenario(path, regime, room, codec) for room in job.rooms
        for path, regime in job.scenarios
    ]  # fmt: skip
    with torch.no_grad():
        text = model.text(tokenize(prompt_of(scenes[0].attributes))[None])
        result, frames = _measure(job, model, codec, scenes, text, out)
    result["seconds"] = time.perf_counter() - begin
    truth = {scene.key: as_bytes(scene.truth[len(scene.given) :]) for scene in scenes}
    written = write_report(result, frames, truth, out)
    if as_json:
        print(json.dumps({key: result[key] for key in JSON_KEYS}))
    else:
        print(table(result))
        print(f"\n{written[0]} shows all of it; {written[1]} is the receipt.")
        if left_out := mp4_left_out():
            print(left_out)
    return 0


JSON_KEYS = ("schema_version", "device", "versions", "seconds", "rows", "sites", "passes")


def _compile(
    job, model, scene, text, codec, out: Path, advance
) -> tuple[list[Contender], dict[str, str]]:
    """Compile all contenders one after the other, and show the first film at once.

    The dense one comes first: it needs no kernel of ours, which is built beside it.
    """
    made: dict[str, Contender] = {}
    presets: dict[str, str] = {}
    for preset in job.presets:
        advance(f"compiling {preset}", done=0)
        made[preset] = Contender(preset, model, job.inner)
        run_ = made[preset].warm_up(scene, text)
        for site in lipass.report().to_dict()["sites"]:
            presets.setdefault(site["model"], preset)  # a contender has a model of its own
        advance(f"compiled {preset} in {made[preset].compile_s:.0f} s")
        if len(made) == 1:
            advance(f"{_first_film(preset, scene, run_, codec, out)} moves already", done=0)
    return [made[preset] for preset in job.presets], presets


def _first_film(preset: str, scene: Scenario, run_: Run, codec, out: Path) -> Path:
    given = len(scene.given)
    films = {
        "truth": as_bytes(scene.truth[given:]),
        preset: as_bytes(codec.decode(run_.rollout.latents)[given:]),
    }
    out.mkdir(parents=True, exist_ok=True)
    return side_by_side(films, out / "first.gif")


def _measure(
    job: Scope, model, codec, scenes: list[Scenario], text, out: Path
) -> tuple[dict, dict]:
    rows: list[dict] = []
    rollouts: list[dict] = []
    frames: dict[tuple, Any] = {}
    compared = len(job.presets) + len(RIVALS) * job.with_rivals
    total = len(job.presets) + compared * len(scenes) * job.repeats
    with progress("demo", total) as advance:
        contenders, presets = _compile(job, model, scenes[0], text, codec, out, advance)
        dense = next(one for one in contenders if one.preset == "off")
        loops = rivals(dense) if job.with_rivals else []
        sites: dict[tuple, dict] = {}
        for scene in scenes:
            new, runs = compare(
                [*contenders, *loops], scene, text, codec, job.repeats,
                lambda preset, scene=scene: advance(f"{scene.path} {preset}"),
            )  # fmt: skip
            rows += new
            if scene.regime == "free":
                told = codec.decode(scene.walls[len(scene.given) :])
                frames[("bare walls", *scene.key)] = as_bytes(told)
            if job.with_baselines and scene.regime == "explored":
                for row, shown in baselines(scene, contenders[0], text, codec):
                    rows.append(row)
                    frames[(row["preset"], *scene.key)] = as_bytes(shown)
            for preset, run_ in runs.items():
                key = (preset, *scene.key)
                frames[key] = as_bytes(run_.frames[len(scene.given) :])
                rollouts.append(_rollout(key, scene, run_))
            for site in lipass.report().to_dict()["sites"]:
                preset = presets.get(site["model"], "")
                sites[preset, site["name"]] = {"preset": preset, **site}
    receipt = lipass.report().to_dict()
    return {
        "schema_version": SCHEMA_VERSION,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {
            "lipass": lipass.__version__, "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
        "rows": rows,
        "rollouts": rollouts,
        "rooms": {str(scene.room.seed): plan_of(scene.room) for scene in scenes},
        "sites": list(sites.values()),
        "passes": receipt["passes"],
    }, frames  # fmt: skip


_NO_PLAN: dict = {"frames": [], "window_chunks": None, "dynamics": None}


def as_bytes(frames: Tensor) -> np.ndarray:
    """Turn frames `[F, 3, H, W]` in 0..1 into pictures `uint8 [F, H, W, 3]`."""
    return (frames.clamp(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1).contiguous().numpy()


def plan_of(room: Room) -> dict:
    """Give the walls and boxes of a room, seen from above, in metres."""
    width, _, depth = room.size_m.tolist()
    boxes = [[low[0], low[2], high[0], high[2]] for low, high in room.boxes.tolist()]
    return {"size": [width, depth], "boxes": boxes}


def path_of(w2c: Tensor) -> list[list[float]]:
    """Give x and z in metres and the yaw in degrees of cameras `[F, 4, 4]`."""
    c2w = invert(w2c)
    yaw = torch.rad2deg(torch.atan2(c2w[:, 0, 2], c2w[:, 2, 2]))
    return torch.stack([c2w[:, 0, 3], c2w[:, 2, 3], yaw], -1).tolist()


def _rollout(key: tuple, scene: Scenario, run: Run) -> dict:
    chunks = []
    for i, record in enumerate(run.rollout.chunks):
        plan = run.plans[i] if run.plans else None
        context = plan["context"] if plan else _NO_PLAN
        chunks.append(
            {
                "index": record.start // CHUNK_LATENTS,
                "context": record.context,
                "reasons": {str(f["index"]): f["reason"] for f in context["frames"]},
                "window_chunks": context["window_chunks"],
                "dynamics": context["dynamics"],
                "overlap_max": max((f["overlap"] or 0 for f in context["frames"]), default=None),
                "steps_computed": record.steps_computed,
                "steps_total": 4,
                **(plan["done"] if plan else {}),
                "density": run.density,
                "seconds": record.prefill_s + record.denoise_s,
            }
        )
    preset, path, regime, room = key
    return {"preset": preset, "trajectory": path, "regime": regime, "room": room,
            "camera": path_of(scene.w2c), "chunks": chunks}  # fmt: skip
