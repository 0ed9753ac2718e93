"""Hold presets against the dense model along walks of 64 chunks: drift, seams, gated loop score.

    python -m benchmarks.along [--models small stream] [--rooms 9301 ...] [--page-only]

The first half of a walk with loops is recorded, the second half leads back over it and is
generated. A preset keeps what is dense where its mean over the rooms lies within the 95 % interval
of the dense model, or is better. Graphs run without Inductor, as pictures do not depend on it. The
walks are those of `lipass eval --long`; a run that was ended goes on where it was. Writes
benchmarks/results/along.json, and its table in docs/eval.md.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.readme import between
from lipass.cli.progress import progress
from lipass.quality import METRICS
from lipass.quality.results import Results
from lipass.quality.run import evaluate, missing
from lipass.quality.summary import KEPT, summary

ROOT = Path(__file__).parents[1]
RECORDED, PAGE = ROOT / "benchmarks/results/along.json", ROOT / "docs/eval.md"
WORLDS = {"small": "evaluated", "stream": "stream_evaluated"}
METHODS = {
    "small": ("off", "all", "reference", "2 steps, 8 latents"),
    "stream": ("dense", "all", "window 10"),
}
_SHOWN = (*KEPT, "psnr_vs_truth_db", "psnr_vs_off_db")


def along(model: str, rooms: tuple[int, ...]) -> list[dict[str, Any]]:
    """Roll out what is missing, and sum up."""
    world = import_module(f"lipass.examples.tinyworld.{WORLDS[model]}")
    scope = dataclasses.replace(
        world.SCOPES["long"], methods=METHODS[model], rooms=rooms, inner="eager"
    )
    subject = world.subject(scope)
    path = Path(f"build/along-{model}.jsonl")
    path.parent.mkdir(exist_ok=True)
    cases = [list(case) for case in subject.cases]
    results = Results(path, {"cases": cases, "settings": subject.settings})
    todo = sum(len(methods) for _, methods in missing(subject, results))
    with progress(f"along {model}", max(todo, 1)) as advance:
        evaluate(subject, results, advance)
    found = summary(results, subject.methods[0])
    return [
        {
            "model": model,
            "method": one["method"],
            "verdicts": one["verdicts"],
            "kept": one["kept"],
            "metrics": {
                key: {name: _rounded(value) for name, value in one["metrics"][key].items()}
                for key in _SHOWN
                if key in one["metrics"]
            },
        }
        for one in found
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def table(document: dict[str, Any]) -> str:
    """Write a line a method, in bold what is outside of the dense model's interval, and say it."""
    titles = [METRICS[metric].title for metric in KEPT]
    lines = [f"| model | method | {' | '.join(titles)} | PSNR to the renderer, dB |"]
    lines.append("|---" * (len(KEPT) + 3) + "|")
    lines += [f"| {' | '.join(_cells(one))} |" for one in document["methods"]]
    said = " ".join(_said(one) for one in document["methods"] if one["kept"])
    return "\n".join([*lines, "", said])


def _said(one: dict[str, Any]) -> str:
    metrics = [metric for metric, kept in one["kept"].items() if kept is False]
    lost = [METRICS[metric].title.removesuffix(", dB") for metric in metrics]
    told = f"{', '.join(lost)} not kept" if lost else "all kept"
    if broke := one["verdicts"].get("broken"):
        told += f"; {broke} of {sum(one['verdicts'].values())} walks broke"
    return f"`{one['method']}` of {one['model']}: {told}."


def _cells(one: dict[str, Any]) -> Iterator[str]:
    yield from (one["model"], f"`{one['method']}`")
    for metric in (*KEPT, "psnr_vs_truth_db"):
        figures, digits = one["metrics"].get(metric), METRICS[metric].digits
        told = "none" if figures is None else f"{figures['mean']:.{digits}f}"
        if one["kept"].get(metric) is False:
            told = f"**{told}**"
        if not one["kept"] and figures and figures["low"] is not None:  # the dense model
            told += f" ({figures['low']:.{digits}f} to {figures['high']:.{digits}f})"
        yield told


def main() -> None:
    """Measure, record, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(WORLDS), default=["small", "stream"])
    parser.add_argument("--rooms", type=int, nargs="+", default=list(range(9301, 9307)))
    parser.add_argument("--page-only", action="store_true", help="from what was recorded")
    args = parser.parse_args()
    if not args.page_only:
        methods = [one for model in args.models for one in along(model, tuple(args.rooms))]
        document = {"environment": environment(), "rooms": args.rooms, "methods": methods}
        RECORDED.write_text(json.dumps(document, indent=1) + "\n")
    found = table(json.loads(RECORDED.read_text()))
    PAGE.write_text(between(PAGE.read_text(), "along", found), encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
