"""Search walks and rooms for the worst that each preset does, and write docs/failures.md about it.

    python -m benchmarks.failures [--rooms 9301 9302 9303] [--search build/failures.jsonl]

Each preset rolls out through all walks, hard ones among them, in both regimes; graphs run without
Inductor, as pictures do not depend on it. The search is kept rollout by rollout and goes on where
it was ended. Of the worst walks it is asked why: how much of the frame was shown by what was read,
by what the dense loop reads, and by all of the history, from true depth. Results go to
benchmarks/results/failures.json, the page and its pictures to docs.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.environment import environment
from lipass.cli.progress import progress
from lipass.examples.tinyworld.compare import Run
from lipass.examples.tinyworld.evaluated import DENSE, Scope, Small
from lipass.examples.tinyworld.hard_scenes import HARD
from lipass.examples.tinyworld.model import CHUNK_LATENTS
from lipass.examples.tinyworld.rollout import SIGMAS
from lipass.examples.tinyworld.scenario import PATHS, REGIMES
from lipass.quality import Rollout, Scene, Space
from lipass.quality.checks import broken
from lipass.quality.figures import worst_and_typical
from lipass.quality.results import Entry, Results
from lipass.quality.run import evaluate, missing
from lipass.quality.subject import Case

PRESETS = ("context", "sparse", "cache", "all", "reference")
WALKS = (*PATHS, *HARD)
ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks/results/failures.json"
PAGE, PICTURES = ROOT / "docs/failures.md", ROOT / "docs/failures"
# Of pictures on the page, which are soft.
_TILE_PX, _QUALITY = 144, 88
# What separates a frame that memory misses from one that it has.
_DIFFERS, _IMAGINED = 0.1, 0.5


def search(
    rooms: tuple[int, ...], trajectories: tuple[str, ...], regimes: tuple[str, ...], path: Path
) -> tuple[Small, list[Entry]]:
    """Roll all presets out through all walks, as far as it was not done yet."""
    scope = Scope((DENSE, *PRESETS), trajectories, regimes, rooms, (0,), "eager")
    subject = Small(scope)
    cases = [list(case) for case in subject.cases]
    results = Results(path, {"cases": cases, "settings": subject.settings})
    todo = sum(len(methods) for _, methods in missing(subject, results))
    with progress("search", max(todo, 1)) as advance:
        evaluate(subject, results, advance)
    return subject, results.entries


def _db(entry: Entry) -> float:
    """PSNR of the worst chunk; nothing is worse than values that cannot be compared."""
    value = entry.values["psnr_vs_off_worst_db"]
    return -math.inf if value is None else value


def worst(entries: list[Entry]) -> list[Entry]:
    """Choose what is shown: the worst walk of each preset, and that of `all` on each hard walk."""
    shown = []
    for preset in PRESETS:
        own = sorted((one for one in entries if one.method == preset), key=_db)
        shown.append(own[0])
        if preset == "all":
            of_hard = [[one for one in own if one.case.trajectory == name] for name in HARD]
            shown += [group[0] for group in of_hard if group[0] is not own[0]]
    return shown


def table(entries: list[Entry]) -> list[dict[str, Any]]:
    """Give the worst chunk of all rooms, by walk, regime and preset; None where one is broken."""
    rows = []
    for trajectory, regime in dict.fromkeys(one.case[:2] for one in entries):
        here = [one for one in entries if one.case[:2] == (trajectory, regime)]
        worst_db = {
            preset: min(_db(one) for one in here if one.method == preset) for preset in PRESETS
        }
        by_preset = {
            preset: round(db, 1) if math.isfinite(db) else None for preset, db in worst_db.items()
        }
        rows.append({"trajectory": trajectory, "regime": regime, **by_preset})
    return rows


def made_of(scene: Scene, run: Run, dense: Run, frame: int) -> dict[str, Any]:
    """Say what a frame was made of, beside what the dense loop had.

    Shares are of the pixels of the frame that some latent shows: of those that were read, of those
    that the dense loop reads, and of the history.
    """
    at = (frame - scene.given) // CHUNK_LATENTS
    chunk, full = run.rollout.chunks[at], dense.rollout.chunks[at]
    assert scene.space is not None
    seen = _seen(scene.space, frame, chunk.start)
    lost = max(
        set(full.context) - set(chunk.context), key=lambda i: float(seen[i].mean()), default=None
    )
    return {
        "latents": [len(chunk.context), len(full.context)],
        "steps": [chunk.steps_computed, len(SIGMAS) - 1],
        "density": round(run.density, 3),
        "share_read": _share(seen, chunk.context),
        "share_dense": _share(seen, full.context),
        "share_ever": _share(seen, range(chunk.start)),
        "left_out": None
        if lost is None
        else {
            "latent": lost,
            "share": round(float(seen[lost].mean()), 3),
            "reason": _left_out(run, at, lost),
        },
    }


def why(made: dict[str, Any]) -> str:
    """Say in a sentence or two what that explains."""
    read, dense, ever = (made[f"share_{name}"] for name in ("read", "dense", "ever"))
    few, many = made["latents"]
    shown = f"what was read shows {read:.0%} of the frame, what the dense loop reads {dense:.0%}"
    if dense - read > _DIFFERS:
        lost = made["left_out"]
        return (
            f"Memory lacks it: {shown}. Latent {lost['latent']}, which shows {lost['share']:.0%}, "
            f"was left out ({lost['reason']})."
        )
    if ever < _IMAGINED:
        return (
            f"It is imagined: no more than {ever:.0%} of the frame was ever seen, and from {few} "
            f"latents in place of {many} it becomes another picture."
        )
    if read - dense > _DIFFERS:
        return f"The dense loop lacks it: {shown}."
    if made["density"] < 1:
        return (
            f"Blocks lack: {shown}, from {few} and {many} latents, and attention visits "
            f"{made['density']:.0%} of their blocks."
        )
    if few < many:
        return f"Fewer looks at the same place: {shown}, from {few} latents in place of {many}."
    steps, total = made["steps"]
    return f"Steps lack: the same latents were read, and {steps} of {total} steps computed."


def _seen(space: Space, frame: int, history: int) -> torch.Tensor:
    """Which pixels of a frame each latent of the history shows `[history, H, W]`."""
    return torch.stack([space.seen_from(frame, i)[1] for i in range(history)]).double()


def _share(seen: torch.Tensor, latents: Any) -> float:
    return round(float(seen[list(latents)].amax(0).mean()), 3)


def _left_out(run: Run, chunk: int, latent: int) -> str:
    frames = run.plans[chunk]["context"]["frames"] if run.plans else []
    return next((one["reason"] for one in frames if one["index"] == latent), "it was not chosen")


def explain(
    subject: Small, entry: Entry, entries: list[Entry]
) -> tuple[dict[str, Any], Image.Image]:
    """Roll a walk out once more, and say why the worst frame of its worst chunk is what it is."""
    case = entry.case
    scene = subject.scene(case)
    dense, run = subject.run(DENSE, case), subject.run(entry.method, case)
    with torch.no_grad():
        films = [subject.codec.decode(one.rollout.latents) for one in (dense, run)]
    frame = worst_frame(films[1], films[0], scene)
    assert scene.truth is not None
    values = {
        key: round(value, 3)
        for key, value in entry.values.items()
        if value is not None and key.startswith(("psnr", "ssim", "loop"))
    }
    row = {
        "preset": entry.method,
        **case._asdict(),
        "frame": frame,
        "chunk_start": scene.given + (frame - scene.given) // CHUNK_LATENTS * CHUNK_LATENTS,
        "verdict": entry.verdict,
        "values": values,
        "dense_vs_truth_db": round(_dense(entries, case)["psnr_vs_truth_db"], 3),
        "made_of": made_of(scene, run, dense, frame),
    }
    return row, _picture([film[frame] for film in (scene.truth, *films)])


def worst_frame(made: torch.Tensor, wanted: torch.Tensor, scene: Scene) -> int:
    """Choose the frame that is shown: one of the worst chunk, which figures and verdict are of."""
    spoilt = broken(made, "frames")
    if spoilt.any():
        return int(spoilt.nonzero()[0])
    return worst_and_typical(Rollout(made), wanted, scene)[0]


def _dense(entries: list[Entry], case: Case) -> dict[str, Any]:
    return next(dict(one.values) for one in entries if (one.method, one.case) == (DENSE, case))


def _picture(tiles: list[torch.Tensor]) -> Image.Image:
    sheet = Image.new("RGB", (len(tiles) * (_TILE_PX + 4) - 4, _TILE_PX), "white")
    for i, tile in enumerate(tiles):
        pixels = (
            (tile.nan_to_num().clamp(0, 1) * 255 + 0.5)
            .byte()
            .permute(1, 2, 0)
            .contiguous()
            .numpy()
        )
        large = Image.fromarray(pixels).resize((_TILE_PX, _TILE_PX), Image.Resampling.BICUBIC)
        sheet.paste(large, (i * (_TILE_PX + 4), 0))
    return sheet


def picture_of(row: dict[str, Any]) -> str:
    """Name the picture of a shown walk, below docs."""
    words = f"{row['preset']} {row['trajectory']} {row['regime']}"
    return f"failures/{words.replace('/', '-').replace(' ', '-')}.jpg"


_HEAD = """# Where it fails

The worst that each preset does to TinyWorld, found by a search over walks and rooms, and written
down by `python -m benchmarks.failures`; nothing is left out. Rollouts: {count}, of the walks
{walks}, {regimes}, in room {rooms}, at commit {commit}.

Figures are PSNR to the dense model in the worst chunk of four latents, in dB; [how it is measured,
and what the verdicts mean](eval.md). In the free regime much of what is seen is imagined: another
picture is not always a worse one, so the distance to the renderer stands beside it.
"""
_WALKS = """
- `fast turn` turns by {fast} from one latent to the next, a quarter of what is seen.
- `fog` turns in thick fog, where only what is near shows.
- `look-alike` turns round in a square room with four walls alike and nothing in it.
- `near wall` sidesteps along what is near.
- `door` goes round the free end of a partition, looks behind it and comes back.
"""


def page(document: dict[str, Any]) -> str:
    """Write the page from what was recorded."""
    environment_ = document["environment"]
    head = _HEAD.format(
        count=document["rollouts"],
        walks=", ".join(f"`{name}`" for name in document["trajectories"]),
        regimes=" and ".join(document["regimes"]),
        rooms=", ".join(map(str, document["rooms"])),
        commit=environment_["commit"],
    )
    lines = [head, "## Worst chunks", _WALKS.format(fast="18 degrees")]
    for regime in document["regimes"]:
        lines += [f"**{regime.capitalize()}**", "", f"| walk | {' | '.join(PRESETS)} |"]
        lines.append("|---" * (1 + len(PRESETS)) + "|")
        lines += [
            f"| {row['trajectory']} | {' | '.join(_told(row[preset]) for preset in PRESETS)} |"
            for row in document["table"]
            if row["regime"] == regime
        ]
        lines.append("")
    lines += ["## The worst of each preset, and of `all` on each hard walk", ""]
    lines += ["Columns: the renderer, the dense model, the preset.", ""]
    for row in document["shown"]:
        lines += _section(row)
    return "\n".join(lines).rstrip() + "\n"


def _told(db: float | None) -> str:
    return "broken" if db is None else f"{db:.1f}"


def _section(row: dict[str, Any]) -> list[str]:
    values = row["values"]
    where = f"{row['trajectory']}, {row['regime']}, room {row['room']}, frame {row['frame']}"
    title = f"`{row['preset']}`: {row['trajectory']}, {row['regime']}"
    figures = "from here on values are no numbers or far from 0..1."
    if "psnr_vs_off_worst_db" in values:
        figures = (
            f"{values['psnr_vs_off_worst_db']:.1f} dB in "
            f"this chunk, {values['psnr_vs_off_db']:.1f} dB over the walk. To the renderer "
            f"{values['psnr_vs_truth_db']:.1f} dB, where the dense model has "
            f"{row['dense_vs_truth_db']:.1f}."
        )
    return [
        f"### {title}",
        "",
        f"![{row['preset']} on the walk {where}]({picture_of(row)})",
        "",
        f"Room {row['room']}, frame {row['frame']}: {figures} Verdict: {row['verdict']}.",
        why(row["made_of"]),
        "",
    ]


def main() -> None:
    """Search, then write results, page and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, nargs="+", default=[9301, 9302, 9303])
    parser.add_argument("--trajectories", nargs="+", choices=WALKS, default=WALKS)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--search", type=Path, default=Path("build/failures.jsonl"))
    parser.add_argument("--page-only", action="store_true", help="from what was recorded")
    args = parser.parse_args()
    if not args.page_only:
        args.search.parent.mkdir(parents=True, exist_ok=True)
        walks, regimes = tuple(args.trajectories), tuple(args.regimes)
        subject, entries = search(tuple(args.rooms), walks, regimes, args.search)
        document = {
            "environment": environment(),
            "rooms": args.rooms,
            "trajectories": walks,
            "regimes": regimes,
            "rollouts": len(entries),
            "table": table(entries),
            "shown": [],
        }
        PICTURES.mkdir(exist_ok=True)
        for old in PICTURES.glob("*.jpg"):
            old.unlink()
        for entry in worst(entries):
            row, picture = explain(subject, entry, entries)
            document["shown"].append(row)
            picture.save(ROOT / "docs" / picture_of(row), quality=_QUALITY)
        RECORDED.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORDED.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
