"""The demo of the streaming world: dense beside a window and beside what poses choose."""

import json
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lipass
from lipass.cli.progress import progress

from .demo import JSON_KEYS, SCHEMA_VERSION, as_bytes, path_of, plan_of
from .metrics import psnr_db
from .model import CHUNK_LATENTS
from .report import table, write_report
from .rollout import SIGMAS
from .stream_compare import METHODS, Run, StreamContender, compare, make_walk, rows, text_of
from .weights import load_stream
from .world import make_room

ROOM = 9001
CHUNKS = {"quick": 8, "main": 32, "full": 64}
# Under the names of the report: what is measured against, and what is shown beside it.
SHOWN = {"off": METHODS["dense"], "window": METHODS["window 10"], "all": METHODS["all"]}


def run(*, scope: str, out: Path, as_json: bool, threads: int | None) -> int:
    """Roll out along a walk with loops and write the report; `lipass demo --model stream`."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 8 * len(SHOWN)
    begin = time.perf_counter()
    inner = "eager" if scope == "quick" else "inductor"
    model, codec = load_stream()
    text = text_of(model)
    with progress("demo", len(SHOWN) + CHUNKS[scope]) as advance:
        walk = make_walk(ROOM, CHUNKS[scope], codec)
        contenders, compile_s = [], {}
        for name, method in SHOWN.items():
            contenders.append(StreamContender(method, model, inner))
            compile_s[name] = contenders[-1].warm_up(walk, text)
            advance(f"compiled {name}")
        runs = compare(contenders, walk, text, advance)
    scene = ("out and back", "explored", ROOM)
    films = {
        (name, *scene): as_bytes(run.frames(codec)) for name, run in zip(SHOWN, runs, strict=True)
    }
    result = {
        "schema_version": SCHEMA_VERSION,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {
            "lipass": lipass.__version__, "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
        "rows": [
            _row(name, scene, measured, run, runs[0]) | {"compile_s": compile_s[name]}
            for name, measured, run in zip(SHOWN, rows(runs, codec), runs, strict=True)
        ],
        "rollouts": [_rollout(name, scene, run) for name, run in zip(SHOWN, runs, strict=True)],
        "rooms": {str(ROOM): plan_of(make_room(ROOM))},
        "sites": lipass.report().to_dict()["sites"],
        "passes": lipass.report().to_dict()["passes"],
    }  # fmt: skip
    result["seconds"] = time.perf_counter() - begin
    written = write_report(result, films, {scene: as_bytes(walk.truth)}, out)
    if as_json:
        print(json.dumps({key: result[key] for key in JSON_KEYS}))
    else:
        print(table(result))
        print(f"\n{written[0]} shows all of it; {written[1]} is the receipt.")
    return 0


def _seconds(run: Run) -> float:
    return sum(chunk.seconds for chunk in run.generated)


def _row(name: str, scene: tuple, measured: dict, run: Run, dense: Run) -> dict[str, Any]:
    """Give a row under the names of the report, whose speed is that of all that is shown."""
    trajectory, regime, room = scene
    generated = run.generated
    return {
        "preset": name,
        "trajectory": trajectory,
        "regime": regime,
        "room": room,
        "dit_core_s": _seconds(run),
        "speedup_vs_off": _seconds(dense) / _seconds(run),
        "psnr_vs_off_db": measured["psnr_vs_dense_db"] or psnr_db(run.walk.truth, run.walk.truth),
        "psnr_vs_truth_db": measured["psnr_vs_truth_db"],
        "density": measured["density"],
        "steps_computed": measured["steps_computed"],
        "steps_total": (len(SIGMAS) - 1) * len(generated),
        "context_latents_mean": statistics.mean(len(chunk.context) for chunk in generated),
        "kv_bytes_peak": measured["kv_bytes_peak"],
        "recompiles_after_warmup": measured["recompiles_after_warmup"],
    }


def _rollout(name: str, scene: tuple, run: Run) -> dict[str, Any]:
    """Give what each generated chunk read, and why."""
    plans = {}
    if run.session is not None:
        plans = {
            record.plan.index: record.plan.context
            for record in lipass.report().chunks
            if record.session == run.session.number
        }
    chunks = []
    for chunk in run.generated:
        index = chunk.start // CHUNK_LATENTS
        plan = plans.get(index)
        chunks.append(
            {
                "index": index,
                "context": chunk.context,
                "reasons": {str(f.index): f.reason for f in plan.frames} if plan else {},
                "window_chunks": plan.window_chunks if plan else None,
                "dynamics": plan.dynamics if plan else None,
                "overlap_max": max((f.overlap or 0 for f in plan.frames), default=None)
                if plan
                else None,
                "steps_computed": chunk.steps_computed,
                "steps_total": len(SIGMAS) - 1,
                "density": run.density,
                "seconds": chunk.seconds,
            }
        )
    trajectory, regime, room = scene
    return {"preset": name, "trajectory": trajectory, "regime": regime, "room": room,
            "camera": path_of(run.walk.w2c), "chunks": chunks}  # fmt: skip
