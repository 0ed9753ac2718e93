"""Draft the wiring of a model: find its denoising loop and write it with the lines of a session.

The file is read, not run. What only its author can know becomes a comment, `# Open 1: ..`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from lipass.cli import NOTHING_MATCHED, OK, UsageError
from lipass.cli.terminal import paint, paragraph
from lipass.errors import LipassError

SUMMARY = "draft the wiring of a model of your own: its loop with the lines of a session"
SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass init`."""
    parser.add_argument(
        "target",
        metavar="FILE",
        help="file.py, or file.py:name of the function or class that holds the loop, or "
        "module:name, such as diffusers:WanPipeline",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="DRAFT",
        help="file to write (default: FILE_lipass.py beside it); never overwritten",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Find the loop, write the draft, say what is open; 3 where there is no loop."""
    from lipass.cli.init_draft import draft_loop
    from lipass.cli.init_find import rollouts
    from lipass.cli.init_pipeline import draft_pipeline, is_pipeline

    path, name = _source(args.target)
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        where = f"{error.msg} in line {error.lineno}"
        raise UsageError(f"FILE must be Python, got {path} with {where}; mend it") from error
    found = [one for one in rollouts(tree) if name in ("", one.function.name, one.owner)]
    if not found:
        where = f"{path}:{name}" if name else str(path)
        print(f"no denoising loop was found in {where}; {_LOOKS_LIKE}", file=sys.stderr)
        return NOTHING_MATCHED
    one = found[0]
    if ".steps(" in ast.unparse(one.steps.iter):
        print(f"{path}, line {one.steps.lineno}, has a session already", file=sys.stderr)
        return NOTHING_MATCHED
    out = Path(args.out) if args.out else Path(_beside(path, args.target))
    try:
        if is_pipeline(tree, one):
            draft = draft_pipeline(args.target, path, one)
        else:
            draft = draft_loop(path, source, tree, one)
        ast.parse(draft.text)
    except SyntaxError as error:
        raise LipassError(
            f"the function and the loops of a draft must be written over lines of their own, with "
            f"spaces, got line {one.steps.lineno} of {path}; format the file (ruff format)"
        ) from error
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(draft.text)
    except FileExistsError as error:
        raise UsageError(f"DRAFT must be a new file, got {out}; name another with -o") from error
    except OSError as error:
        raise UsageError(
            f"DRAFT must be writable, got {out} ({error.strerror}); name another with -o"
        ) from error
    facts = _facts(one)
    if args.json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "draft": str(out),
            "found": facts,
            "open": draft.questions,
        }
        print(json.dumps(document, indent=1))
    else:
        print("\n".join(_lines(path, out, facts, draft.questions, found[1:])))
    return OK


_LOOKS_LIKE = (
    "one is a `for` over noise levels or timesteps in which a model is called and what it was "
    "called with is updated; name the file that holds it, or wire by hand as examples/own_model.py"
)


def _source(text: str) -> tuple[Path, str]:
    """Return the file of a target and the name in it, or ""."""
    where, colon, name = text.rpartition(":")
    if not colon or text.endswith(".py"):  # the colon of a drive
        where, name = text, ""
    path = Path(where)
    if where.endswith(".py"):
        if not path.is_file():
            raise UsageError(f"FILE must exist, got {where!r}; check the path")
        return path, name
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise UsageError(f"FILE must be file.py or module:name, got {text!r}; try my_model.py")
    return (_home(where, name) if name else None) or Path(spec.origin), name


def _home(module: str, name: str) -> Path | None:
    """Import a module to find where a name of it is written."""
    import inspect

    made = getattr(importlib.import_module(module), name, None)
    if made is None:
        raise UsageError(f"{module} must have {name!r}, and has not; check the name")
    file = inspect.getsourcefile(made)
    return None if file is None else Path(file)


def _beside(path: Path, target: str) -> str:
    inside = target.partition(":")[0].endswith(".py")
    name = f"{path.stem}_lipass.py"
    return str(path.with_name(name)) if inside else name


def _facts(one: Any) -> dict[str, Any]:
    """List what was found, by what it is for; "" where it was not."""
    place = f"{one.owner}.{one.function.name}" if one.owner else one.function.name
    return {
        "loop": f"{place}, line {one.steps.lineno}",
        "model": f"{one.model}, {one.calls} calls a step" if one.calls > 1 else one.model,
        "updated": one.latents,
        "levels": one.levels and f"{one.levels} ({one.form})",
        "chunks": one.chunks and f"the loop in line {one.chunks.lineno}",
        "history": one.history,
        "cameras": ", ".join(filter(None, (one.past, one.query))) or ", ".join(one.poses),
        "prefill": ", ".join(f"line {call.lineno}" for call in one.prefill),
        "cache": ", ".join(one.caches),
        "guidance": "calls are told apart by what they are given" if one.guided else "",
    }


def _lines(
    path: Path, out: Path, facts: dict[str, Any], questions: list[str], others: list[Any]
) -> list[str]:
    lines = [f"found in {path}:"]
    for name, value in facts.items():
        said = str(value) if value else paint("not found", "yellow")
        if name == "guidance" and not value:
            said = "none"
        lines.append(f"  {name:10}{said}")
    for one in others[:4]:
        lines.append(f"  also a loop: {one.function.name}, line {one.steps.lineno}")
    lines += [f"wrote {paint(str(out), 'bold')}, {len(questions)} questions open:"]
    for number, question in enumerate(questions, 1):
        lines += paragraph(f"{number}. {question}", 2, 3)
    return [*lines, f"next: answer them, then run python {out}"]
