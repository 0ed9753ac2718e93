"""Write the pages that say what the code says: options, passes, tested versions, models.

    python -m docs.make.generated

A test holds the pages to what this would write.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from benchmarks import readme
from docs.make import calibrated, grown
from lipass.cli.options import known_options
from lipass.passes import PASSES, PIPELINES
from lipass.passes.core import Numerics, Pass

ROOT = Path(__file__).parents[2]
_NUMERICS = {
    Numerics.EXACT: "the same to the bit",
    Numerics.REORDERED: "the same but for rounding",
    Numerics.APPROX: "approximate",
}
_ROOMS = {
    "facts": ("What a graph holds", "They find out, and change nothing but the spelling."),
    "exact": (
        "What keeps the result",
        "They run in every preset but `off`; `tile-order` where it is asked for.",
    ),
    "approx": ("What changes the result", "They leave out what matters little, where asked to."),
}
_TESTED = ("torch", "triton", "numpy", "networkx", "sympy", "diffusers", "transformers", "einops")
_GRAPH = re.compile(r"::\n\n((?: {4}.*(?:\n|$)|\n(?= {4}))+)")
_LINES = 40  # of a graph, so that a page can be read


_OPTIONS = """# Options

Options of `torch.compile(model, backend="light_interaction", options={...})` and of
`lipass.Session(...)`; give both the same ones. `lipass options [TEXT]` prints this list,
`-o NAME=VALUE` gives one on the command line. Options of passes have the name of the pass in
front: `"find-attention.segments": ("text", "history", "current")`.

In the environment, `LIPASS=off` switches everything off, `LIPASS_DUMP` is a folder for numbered
graphs, and `LIPASS_EVENTS` a file for [events](events.md)."""
_PASSES = """# Passes

In the order of the pipeline of `all`, each with a graph in front of it and behind it: `-` is what
goes, `+` what comes. The graphs are those that its tests hold. `lipass inspect file.py:build
--html page.html` shows what each does to your own model, [how to write a
pass](writing-a-pass.md) how to add one.
"""


def pages() -> dict[str, str]:
    """Return path from the root of the checkout and text of each page that is written here."""
    install, models = (
        (ROOT / "docs" / name).read_text() for name in ("install.md", "models/index.md")
    )
    counts = json.loads((ROOT / "benchmarks/results/real_models.json").read_text())["rows"]
    table = readme.models_table(ROOT / "docs" / "models", counts).replace("(docs/models/", "(")
    calibrate = (ROOT / "docs" / "calibrate.md").read_text()
    points = calibrated.points(ROOT / "examples/tinyworld/weights/calibrated.toml")
    held = json.loads((ROOT / "benchmarks/results/target_chunk.json").read_text())["rows"]
    return {
        "docs/calibrate.md": readme.between(
            readme.between(calibrate, "points", points), "kept", calibrated.kept(held)
        ),
        "docs/grow.md": readme.between(
            (ROOT / "docs" / "grow.md").read_text(), "grow", grown.table()
        ),
        "docs/options.md": options_page(),
        "docs/passes.md": passes_page(),
        "docs/install.md": readme.between(
            readme.between(install, "versions", _versions()), "parts", _parts()
        ),
        "docs/models/index.md": readme.between(models, "models", table),
    }


def options_page() -> str:
    """List every option, as `lipass options` does."""
    sections: dict[str, list[str]] = {"General": []}
    for one in known_options():
        head, dot, _ = one["name"].partition(".")
        short = one["meaning"].startswith("short for")
        section = f"`{head}.*`" if dot else "Short forms" if short else "General"
        default = "" if one["default"] is None else f"`{one['default']!r}`"
        others = "".join(f"<br>{p}: `{value!r}`" for p, value in one["others"].items())
        cells = (f"`{one['name']}`", f"{default}{others}", _cell(one["meaning"]))
        sections.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    lines = [_OPTIONS]
    for section, rows in sections.items():
        lines += [
            "",
            f"## {section}",
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *rows,
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def passes_page() -> str:
    """Show every pass: its docstring, where it runs, and a graph in front of and behind it."""
    classes = {name: load() for name, load in PASSES.items()}
    lines = [_PASSES, *_matrix()]
    order = PIPELINES["all"].split(",")
    for room, (title, what) in _ROOMS.items():
        lines += ["", f"## {title}", "", what]
        for name in order:
            if classes[name].__module__.split(".")[-2] == room:
                lines += _pass(name, classes[name])
    return "\n".join(lines) + "\n"


def _matrix() -> Iterator[str]:
    """Say in which presets each pass runs; presets with one pipeline share a column."""
    columns: dict[str, list[str]] = {}
    for preset, text in PIPELINES.items():
        columns.setdefault(text, []).append(f"`{preset}`")
    yield f"| pass | {' | '.join(', '.join(presets) for presets in columns.values())} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name in PIPELINES["all"].split(","):
        runs = ["yes" if name in text.split(",") else "" for text in columns]
        yield f"| [{name}](#{name}) | {' | '.join(runs)} |"


def _pass(name: str, kind: type[Pass]) -> Iterator[str]:
    yield from ("", f"### `{name}`", "")
    yield f"Result: {_NUMERICS[kind.numerics]}."
    yield ""
    yield _markdown(inspect.getdoc(kind) or "")
    stem = kind.__module__.rpartition(".")[2]
    room = kind.__module__.split(".")[-2]
    golden = _golden(ROOT / "tests" / "passes" / room / f"test_{stem}.py")
    if golden:
        yield from ("", "As its tests hold it:", "", "```diff", *golden, "```")


def _markdown(doc: str) -> str:
    """Fence the graphs of a docstring, and indent its lists by four columns a level."""
    told, parts = "", _GRAPH.split(doc)
    for index, part in enumerate(parts):
        if index % 2:
            told += f":\n\n```text\n{textwrap.dedent(part).rstrip()}\n```\n"
        else:
            told += re.sub(r"^(?= {2})", "  ", part, flags=re.MULTILINE)
    return re.sub(r"^:\n\n(?=```)", "", told, flags=re.MULTILINE)


def _golden(path: Path) -> list[str]:
    """Return the first difference of two graphs that a test holds in full."""
    if not path.exists():
        return []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "assert_expected_inline":
            text = node.args[1]
            if isinstance(text, ast.Constant) and re.search(r"^\+", text.value, re.MULTILINE):
                lines = text.value.rstrip().splitlines()
                cut = len(lines) - _LINES
                return lines if cut <= 0 else [*lines[:_LINES], f" .. {cut} more lines"]
    return []


def _versions() -> str:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    recorded = json.loads((ROOT / "benchmarks/results/real_models.json").read_text())
    lines = ["| | |", "|---|---|", f"| Python | {recorded['python']} |"]
    return "\n".join([*lines, *(f"| {name} | {pinned[name]} |" for name in _TESTED)])


def _parts() -> str:
    """List the other versions that a part of the tests ran with."""
    recorded = json.loads((ROOT / "benchmarks/results/versions.json").read_text())
    lines = [f"`{recorded['ran']}`, without a GPU:", "", "| Python | torch | passed | failed |"]
    lines.append("|---|---|---|---|")
    for row in recorded["rows"]:
        lines.append(f"| {row['python']} | {row['torch']} | {row['passed']} | {row['failed']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for path, text in pages().items():
        (ROOT / path).write_text(text)
