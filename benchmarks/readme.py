"""Write the tables of README.md from what `lipass demo --full --json` measured.

    lipass demo --full --json > build/full.json && python benchmarks/readme.py build/full.json

Rows are means over the rooms. The lines that follow say whether each target of the demo is met.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

PRESETS = ("inductor", "off", "exact", "context", "sparse", "cache", "all", "reference",
           "no-memory", "copy-last")  # fmt: skip
PATHS = ("left/right", "forward/back", "loop")
HEAD = "| path | preset | speed | dB to `off` | dB to the renderer | dB at revisits | context latents | density | steps |"  # noqa: E501
SAME_DB = 99.9

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


def fill(readme: str, rows: list[Row]) -> str:
    """Put the tables in the place of those that follow **Explored** and **Free**."""
    for regime in ("explored", "free"):
        begin = readme.index("| path |", readme.index(f"**{regime.capitalize()}**"))
        end = readme.index("\n\n", begin)
        readme = readme[:begin] + table(rows, regime) + readme[end:]
    return readme


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
    for regime in ("explored", "free"):
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
    """Rewrite README.md in place and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, help="what `lipass demo --full --json` printed")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    document = json.loads(args.document.read_text())
    args.readme.write_text(fill(args.readme.read_text(), document["rows"]))
    print("\n".join(summary(document)))


if __name__ == "__main__":
    main()
