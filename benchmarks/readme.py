"""Write the tables of README.md and docs/results.md from what was recorded.

    lipass demo --full --json > build/full.json && python benchmarks/readme.py build/full.json

puts the rows of a full demo into docs/results.md, as means over the rooms, and says whether each
target of the demo is met. Without a document only the tables of steering there are written anew,
from benchmarks/results/steering.json, and README.md: its table of presets from docs/results.md,
that of the streaming world from benchmarks/results/long_context.json, and that of models from
docs/models and benchmarks/results/real_models.json.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PRESETS = ("inductor", "off", "exact", "context", "sparse", "cache", "all", "reference",
           "1 step", "1 step, 12 latents", "2 steps", "2 steps, 12 latents", "2 steps, 8 latents",
           "2 steps, 8 random", "no-memory", "copy-last")  # fmt: skip
PATHS = ("left/right", "forward/back", "loop")
REGIMES = ("explored", "free")
HEAD = "| path | preset | speed | dB to `off` | dB to the renderer | dB at revisits | context latents | density | steps |"  # noqa: E501
SAME_DB = 99.9

MEANINGS = {
    "off": "nothing: plain Inductor",
    "exact": "nothing but rounding",
    "context": "history frames are left out, by camera poses and latent dynamics",
    "sparse": "attention visits the blocks that matter",
    "cache": "denoising steps are reused",
    "all": "the three together",
    "reference": "the three as in the paper's release",
    "1 step, 12 latents": "plain Inductor with the first of the four steps, and 12 latents of 20",
    "2 steps": "plain Inductor with two of the four steps",
    "2 steps, 12 latents": "that, and the loop's own retrieval cut to 12 latents",
    "2 steps, 8 latents": "the same",
}
# What a page's examination does not say: tests/models and tests/adapters hold it.
NOTED = {
    "diffusers": {"blocks": "yes", "steps": "on revisits"},
    "self-forcing": {"steps": "with cameras"},
}
COUNTED = {"diffusers": ("wan-2.1-14b", "hunyuan-video")}
# Walks of so few chunks say little of a long history.
STREAM_SHORTEST = 16
STREAM_METHODS = {
    "dense": "all of it",
    "window 10": "the first chunk and a window of 9 chunks",
    "window 20": "the same of 19 chunks",
    "keep-kv, 32 chunks held": "`context`: 8 chunks that poses choose of 32 that are held",
    "all": "`all`, 8 of 32 chunks that are held",
    "all, 20 of 48 chunks": "`all`, 20 of 48 chunks that are held",
}
_EXAMINED = {
    "blocks": r"all: key blocks skipped: [1-9]",
    "frames": r"all: frames dropped: [1-9]",
    "steps": r"all: steps reused: [1-9]",
}

Row = dict[str, Any]


def mean(rows: list[Row], key: str) -> float | None:
    """Average one number over the rooms; None where no row has it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.mean(values) if values else None


def pick(rows: list[Row], regime: str, path: str, preset: str) -> list[Row]:
    """Return the rows of one line of a table, one a room."""
    place = (regime, path, preset)
    return [r for r in rows if (r["regime"], r["trajectory"], r["preset"]) == place]


def line(path: str, preset: str, rows: list[Row]) -> str:
    """Write one line of a table."""

    def cell(key: str, form: str) -> str:
        value = mean(rows, key)
        return "" if value is None else form.format(value)

    to_off = mean(rows, "psnr_vs_off_db")
    steps = mean(rows, "steps_computed")
    cells = [
        path,
        f"`{preset}`",
        cell("speedup_vs_off", "{:.2f}x"),
        "same" if to_off is not None and to_off >= SAME_DB else cell("psnr_vs_off_db", "{:.1f}"),
        cell("psnr_vs_truth_db", "{:.1f}"),
        cell("self_consistency_db", "{:.1f}"),
        cell("context_latents_mean", "{:.1f}"),
        cell("density", "{:.2f}"),
        "" if steps is None else f"{steps:.0f}/{mean(rows, 'steps_total'):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row], regime: str) -> str:
    """Write the table of one regime."""
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for path in PATHS:
        for preset in PRESETS:
            if found := pick(rows, regime, path, preset):
                lines.append(line(path, preset, found))
    return "\n".join(lines)


def fill(results: str, rows: list[Row]) -> str:
    """Put the tables in the place of those that follow **Explored** and **Free**."""
    for regime in REGIMES:
        begin, end = place_of(results, regime)
        results = results[:begin] + table(rows, regime) + results[end:]
    return results


def place_of(results: str, regime: str) -> tuple[int, int]:
    """Return where the table of a regime begins and ends."""
    begin = results.index("| path |", results.index(f"**{regime.capitalize()}**"))
    return begin, results.index("\n\n", begin)


def presets_table(results: str) -> str:
    """Write the short table: speed and what it cost against the renderer, over the paths."""
    lines = [
        "| preset | what may change | speed, explored | dB to `off` | dB to the renderer "
        "| speed, free | dB to `off` | dB to the renderer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = {regime: list(recorded(results, regime)) for regime in REGIMES}
    for preset, meaning in MEANINGS.items():
        cells = [f"`{preset}`", meaning]
        for regime in REGIMES:
            cells += _cost(shown[regime], preset)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recorded(results: str, regime: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Read path, preset, speed, and dB to `off` and to the renderer back from a long table."""
    begin, end = place_of(results, regime)
    for text in results[begin:end].splitlines()[2:]:
        path, preset, speed, near, truth, *_ = (
            cell.strip() for cell in text.strip("|").split("|")
        )
        yield path, preset.strip("`"), speed, near, truth


def _cost(rows: list[tuple[str, str, str, str, str]], preset: str) -> list[str]:
    dense = {path: float(truth) for path, name, *_, truth in rows if name == "off"}
    mine = [row for row in rows if row[1] == preset]
    if not mine:
        return ["", "", ""]
    speeds = [float(speed.rstrip("x")) for _, _, speed, *_ in mine]
    same = all(near == "same" for *_, near, _ in mine)
    near = [SAME_DB if near == "same" else float(near) for *_, near, _ in mine]
    # Zero is written without a sign, and tenths are taken as they are in the long table.
    changes = [round(float(truth) - dense[path], 1) + 0.0 for path, *_, truth in mine]
    return [
        span(speeds, "{:.1f}x"),
        "same" if same else span(near, "{:.0f}"),
        span(changes, "{:+.1f}").replace("+0.0", "0.0"),
    ]


def span(values: Iterable[float], form: str) -> str:
    """Print the least and the largest value, or one where both print alike."""
    low, high = form.format(min(values := list(values))), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def models_table(pages: Path, counts: list[Row]) -> str:
    """Write a line for each page of models: what was seen to be left out, and what it saves."""
    lines = [
        "| model | sparse blocks | frames left out | steps reused "
        "| FLOPs of dense, `all` | the paper's release |",
        "|---|---|---|---|---|---|",
    ]
    for page in sorted(pages.glob("*.md"), key=lambda one: (one.stem in COUNTED, one.stem)):
        if page.stem == "index":
            continue
        text = page.read_text()
        own = [r for r in counts if r["family"] in COUNTED.get(page.stem, (page.stem,))]
        seen = {what: "yes" for what, form in _EXAMINED.items() if re.search(form, text)}
        seen |= NOTED.get(page.stem, {})
        cells = [
            f"[{_title(text)}](docs/models/{page.name})",
            *(seen.get(what, "") for what in _EXAMINED),
            _share(own, "all"),
            _share(own, "reference"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(text: str) -> str:
    title = text.partition("\n")[0].removeprefix("# ")
    rows = re.findall(r"^\| [\w.-]+ \| (\d+|no) \|", text, re.MULTILINE)
    return (
        f"{title}: {len(rows) - rows.count('no')} of {len(rows)} configurations" if rows else title
    )


def _share(rows: list[Row], preset: str) -> str:
    own = [r["flop_ratio_to_off"] for r in rows if r["preset"].startswith(preset)]
    return span(own, "1/{:.2f}") if own else ""


def stream_table(rows: list[Row]) -> str:
    """Write a line for each way to bound the history of the streaming world, and for none."""
    chunks = sorted({row["chunks"] for row in rows})
    timed = [count for count in chunks if count > STREAM_SHORTEST]
    lines = [
        "| history | tokens read | "
        + " | ".join(f"speed, {count} chunks" for count in timed)
        + " | PSNR to the renderer in dB, "
        + " and ".join(map(str, timed))
        + f" chunks | cache at {timed[-1]} chunks |",
        "|---" * (len(timed) + 4) + "|",
    ]
    known = {row["method"] for row in rows}
    for method, meaning in STREAM_METHODS.items():
        if method not in known:
            continue
        at = {n: [r for r in rows if r["method"] == method and r["chunks"] == n] for n in timed}
        dense = {
            n: [r for r in rows if r["method"] == "dense" and r["chunks"] == n] for n in timed
        }
        speeds = [
            f"{mean(dense[n], 'chunk_s_last') / mean(at[n], 'chunk_s_last'):.1f}x"
            if at[n] and dense[n]
            else ""
            for n in timed
        ]
        truths = [mean(at[n], "psnr_vs_truth_db") for n in timed]
        told = ", ".join("" if one is None else f"{one:.1f}" for one in truths).strip(", ")
        tokens = mean(at[timed[0]], "kv_tokens") or 0
        held = mean(at[timed[-1]], "kv_bytes_peak")
        cells = [meaning, f"{tokens:,.0f}", *speeds, told]
        lines.append(f"| {' | '.join([*cells, '' if held is None else f'{held / 1e6:.0f} MB'])} |")
    return "\n".join(lines)


def steering_table(rows: list[Row]) -> str:
    """Write a line for each way to change a prompt, means over rooms."""
    changes = list(dict.fromkeys(row["change"] for row in rows))
    lines = [
        "| policy | "
        + " | ".join(f"{name}: chunks | dB below | jump" for name in changes)
        + " | edges |",
        "|---" * (3 * len(changes) + 2) + "|",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        cells = [_way(way)]
        for name in changes:
            at = [row for row in own if row["change"] == name]
            took = [row["chunks_to_settled"] for row in at]
            chunks = "never" if None in took else span(took, "{:d}")
            below = (mean(at, "db_below_settled") or 0.0) + 0.0
            cells += [chunks, f"{below:.1f}".replace("-0.0", "0.0"), f"{mean(at, 'jump'):.1f}"]
        lines.append(f"| {' | '.join(cells)} | {mean(own, 'objects'):.2f} |")
    return "\n".join(lines)


def _way(way: str) -> str:
    policy, comma, rest = way.partition(",")
    return f"`{policy}`{comma}{rest}"


def steered(results: str, rows: list[Row]) -> str:
    """Return docs/results.md with the tables of steering written anew."""
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        results = between(results, f"steering {model}", steering_table(own))
    return results


def between(readme: str, name: str, text: str) -> str:
    """Put a table between its two comments."""
    begin = readme.index(f"<!-- {name} -->\n") + len(f"<!-- {name} -->\n")
    return readme[:begin] + text + "\n" + readme[readme.index("<!-- end -->", begin) :]


def readme_of(
    readme: str, results: str, pages: Path, counts: list[Row], streamed: list[Row]
) -> str:
    """Return README.md with its tables written anew."""
    readme = between(readme, "presets", presets_table(results))
    readme = between(readme, "stream", stream_table(streamed))
    return between(readme, "models", models_table(pages, counts))


def summary(document: dict[str, Any]) -> list[str]:
    """Say what the targets of the demo speak of, one line each."""
    rows = document["rows"]
    timed = [row for row in rows if "speedup_vs_off" in row]
    lines = [
        f"{document['seconds']:.0f} s on {document['device']}",
        f"recompiles after warm-up: {max(row['recompiles_after_warmup'] for row in timed)}",
        "exact, relative error at most "
        f"{max(r['relative_error_vs_off'] for r in timed if r['preset'] == 'exact'):.1e}",
    ]
    for preset in ("inductor", "exact", "context", "sparse", "cache", "all"):
        speeds = [row["speedup_vs_off"] for row in timed if row["preset"] == preset]
        lines.append(f"{preset}: {min(speeds):.2f}x to {max(speeds):.2f}x")
    for regime in REGIMES:
        for path in PATHS:
            mine, off = (pick(rows, regime, path, preset) for preset in ("all", "off"))
            if mine:
                change = mean(mine, "psnr_vs_truth_db") - mean(off, "psnr_vs_truth_db")
                lines.append(
                    f"all, {regime} {path}: {mean(mine, 'speedup_vs_off'):.2f}x at "
                    f"{mean(mine, 'psnr_vs_off_db'):.1f} dB, renderer {change:+.2f} dB"
                )
    return lines


def main() -> None:
    """Rewrite docs/results.md, given a document, and README.md in place; print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "document", type=Path, nargs="?", help="what `lipass demo --full --json` printed"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout")
    args = parser.parse_args()
    readme, results = args.root / "README.md", args.root / "docs" / "results.md"
    if args.document:
        document = json.loads(args.document.read_text())
        results.write_text(fill(results.read_text(), document["rows"]))
        print("\n".join(summary(document)))
    counts = json.loads((args.root / "benchmarks/results/real_models.json").read_text())["rows"]
    streamed = json.loads((args.root / "benchmarks/results/long_context.json").read_text())["rows"]
    rows = json.loads((args.root / "benchmarks/results/steering.json").read_text())["rows"]
    results.write_text(steered(results.read_text(), rows))
    pages = args.root / "docs" / "models"
    readme.write_text(readme_of(readme.read_text(), results.read_text(), pages, counts, streamed))


if __name__ == "__main__":
    main()
