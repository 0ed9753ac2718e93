"""List every option that graphs, sessions and passes take, with its default and meaning."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from lipass.cli import NOTHING_MATCHED, OK
from lipass.cli.terminal import paint, paragraph

SUMMARY = "list the options of graphs, sessions and passes, with defaults and meanings"

_ENTRY = re.compile(r"^ {8}(\w+(?:, \w+)*): ", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass options`."""
    parser.add_argument("text", nargs="?", default="", help="list those whose name contains it")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the options; 3 where none has a name like the text."""
    found = [one for one in known_options() if args.text in one["name"]]
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join("\n".join(_lines(one)) for one in found) or f"none has {args.text!r}")
    return OK if found else NOTHING_MATCHED


def known_options() -> list[dict[str, Any]]:
    """Return name, default, meaning and other defaults of presets, in the order of the classes."""
    from lipass.config import SECTIONS, SHORTHANDS, Config
    from lipass.grow_options import GrowOptions
    from lipass.merge_options import MergeOptions
    from lipass.options import ContextOptions, SparseOptions, SteeringOptions, StepOptions
    from lipass.presets import ADAPTIVE, PRESETS

    top = _meanings(Config)
    found: list[dict[str, Any]] = [
        {"name": name, "default": PRESETS["all"][name], "meaning": top[name], "others": {}}
        for name in ("inner", "strict", "verify", "pipeline", "disable", "counted_writes")
    ]
    found[:0] = [
        {
            "name": "preset",
            "default": "all",
            "meaning": f"one of {', '.join(PRESETS)}",
            "others": {},
        },
        {
            "name": "frontier",
            "default": None,
            "meaning": "a file that `lipass calibrate` has written; its options hold where no "
            "other is given",
            "others": {},
        },
    ]
    kinds = {
        "context": ContextOptions,
        "sparse": SparseOptions,
        "steps": StepOptions,
        "merge": MergeOptions,
        "steering": SteeringOptions,
        "grow": GrowOptions,
    }
    for section in SECTIONS:
        said = _meanings(kinds[section])
        for field in dataclasses.fields(kinds[section]):
            default = ADAPTIVE[section][field.name]
            others = {
                preset: values[section][field.name]
                for preset, values in PRESETS.items()
                if values[section] and values[section][field.name] != default
            }
            name = f"{section}.{field.name}"
            meaning = said[field.name]
            found.append({"name": name, "default": default, "meaning": meaning, "others": others})
    for name, targets in SHORTHANDS.items():
        meaning = f"short for {' and '.join(targets)}"
        found.append({"name": name, "default": None, "meaning": meaning, "others": {}})
    for section in SECTIONS:
        decides = (
            "the preset decides"
            if any(values[section] for values in PRESETS.values())
            else "no preset has it on"
        )
        meaning = f"whether {section}.* holds: True or False; {decides}"
        if not dataclasses.fields(kinds[section]):
            meaning = f"whether {_first_line(kinds[section])}; {decides}"
        found.append({"name": section, "default": None, "meaning": meaning, "others": {}})
    return [*found, *_of_passes({one["name"] for one in found})]


def _of_passes(known: set[str]) -> Iterator[dict[str, Any]]:
    """List what single passes can be told, `pass-name.option`, those of other packages too."""
    from lipass.passes import PASSES, registered
    from lipass.passes.core import pass_class

    for name in (*PASSES, *registered()):
        kind = pass_class(name)
        said = {**_meanings(kind), **_texts_below(kind)}
        for field in dataclasses.fields(kind):
            shared = f"{kind.section}.{field.name}" if kind.section else field.name
            meaning = said.get(field.name) or f"option {field.name} of the pass"
            if shared in known:
                meaning = f"what {shared} says, for this pass alone"
            yield {
                "name": f"{name}.{field.name}",
                "default": None if shared in known else field.default,
                "meaning": meaning,
                "others": {},
            }


def _texts_below(kind: type) -> dict[str, str]:
    """Read the texts that stand below the fields of a class."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):  # a class without a file
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(body.body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _first_line(kind: type) -> str:
    line = (inspect.getdoc(kind) or "").partition("\n")[0]
    return line[:1].lower() + line[1:].rstrip(".")


def _meanings(kind: type) -> dict[str, str]:
    """Read the attributes of a class and of those above it out of their docstrings."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        said = (one.__doc__ or "").partition("Attributes:\n")[2]
        entries = list(_ENTRY.finditer(said))
        for entry, behind in itertools.zip_longest(entries, entries[1:]):
            text = said[entry.end() : behind.start() if behind else None]
            found |= dict.fromkeys(entry[1].split(", "), " ".join(text.split()))
    return found


def _lines(option: dict[str, Any]) -> Iterator[str]:
    defaults = [] if option["default"] is None else [f"{option['default']!r}"]
    defaults += [f"{preset}: {value!r}" for preset, value in option["others"].items()]
    yield f"{paint(option['name'], 'bold')}  {'; '.join(defaults)}".rstrip()
    yield from paragraph(option["meaning"], indent=4)
