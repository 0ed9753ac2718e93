"""List every option that graphs and sessions take, with its default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from lipass.cli import NOTHING_MATCHED, OK
from lipass.cli.terminal import paint, paragraph

SUMMARY = "list the options of graphs and sessions, with defaults and meanings"

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
    from lipass.options import ContextOptions, SparseOptions, StepOptions
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
        }
    ]
    kinds = {"context": ContextOptions, "sparse": SparseOptions, "steps": StepOptions}
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
    return found


def _meanings(kind: type) -> dict[str, str]:
    """Read the attributes of a class and of those above it out of their docstrings."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        said = (one.__doc__ or "").partition("Attributes:\n")[2]
        entries = list(_ENTRY.finditer(said))
        for entry, behind in zip(entries, [*entries[1:], None], strict=True):
            text = said[entry.end() : behind.start() if behind else None]
            found |= dict.fromkeys(entry[1].split(", "), " ".join(text.split()))
    return found


def _lines(option: dict[str, Any]) -> Iterator[str]:
    defaults = [] if option["default"] is None else [f"{option['default']!r}"]
    defaults += [f"{preset}: {value!r}" for preset, value in option["others"].items()]
    yield f"{paint(option['name'], 'bold')}  {'; '.join(defaults)}".rstrip()
    yield from paragraph(option["meaning"], indent=4)
