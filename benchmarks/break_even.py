"""Say up to which density block-sparse attention is faster than dense, from what was timed.

    python -m benchmarks.run --json > build/kernels.json
    python -m benchmarks.break_even [build/kernels.json]

Without a document the recorded one is read (benchmarks/results/kernels_cpu.json). Between two
densities the time is taken to be a straight line; planning is included.
"""

import argparse
import json
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "results" / "kernels_cpu.json"


def break_even(rows: list[dict[str, Any]]) -> float:
    """Find the density at which rows of one case take as long as dense; 0 and 1 if none does."""
    rows = sorted(rows, key=lambda row: row["density"])
    before = (0.0, 0.0)
    for row in rows:
        here = (row["density"], row["seconds"] / row["dense_seconds"])
        if here[1] >= 1:
            share = (1 - before[1]) / (here[1] - before[1])
            return before[0] + share * (here[0] - before[0])
        before = here
    return 1.0


def table(rows: list[dict[str, Any]], provider: str) -> list[dict[str, Any]]:
    """Give a row a case and dtype."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["provider"] == provider:
            groups.setdefault((row["case"], row["dtype"]), []).append(row)
    return [
        {
            "case": case,
            "dtype": dtype,
            "queries": of[0]["queries"],
            "keys": of[0]["keys"],
            "break_even_density": round(break_even(of), 2),
        }
        for (case, dtype), of in groups.items()
    ]


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="?", default=RECORDED)
    parser.add_argument("--provider", default="gate", help="default: the operator, gate included")
    args = parser.parse_args()
    for row in table(json.loads(args.document.read_text())["rows"], args.provider):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
