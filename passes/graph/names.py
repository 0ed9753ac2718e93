"""Name what a node is part of: modules, repeats of a call, lines of the user's code."""

from __future__ import annotations

import re
from collections import Counter

import torch.fx

# Behind it come the number of the site in its module, its role, or another name that is joined.
_REPEAT = re.compile(r"@\d+(?=[#:,]|$)")


def module_path(node: torch.fx.Node) -> str:
    """Return the path of the innermost module whose call made the node, such as `blocks.0.attn`.

    A repeat of the outermost call is marked `@1`, `@2`, ...; the root module itself is nothing.
    """
    paths = module_paths(node)
    return paths[-1] if paths else ""


def module_paths(node: torch.fx.Node) -> list[str]:
    """Return the paths of the modules whose calls the node was made in, outermost first.

    A module need not be a part of the one that calls it.
    """
    stack = node.meta.get("nn_module_stack") or {}
    repeat = re.search(r"@\d+$", next(iter(stack), ""))
    paths = []
    for path, _ in stack.values():
        path = re.sub(r"^[LG]\['\w+'\]\.?", "", path)
        path = path.replace("__dict__['_modules']", "")
        path = re.sub(r"\._?modules\['(\w+)'\]|\['?(\w+)'?\]", r".\1\2", path)
        paths.append(path.strip(".") + (repeat.group() if repeat else ""))
    return paths


def without_repeat(name: str) -> str:
    """Return the name of a site without the `@i` of its call: `attn#1:self` of `attn@2#1:self`."""
    return _REPEAT.sub("", name)


def repeat_of(name: str) -> str:
    """Return the `@i` of the call that a site is in; nothing in the first one."""
    found = _REPEAT.search(name)
    return found.group() if found else ""


def joint_name(names: list[str]) -> str:
    """Return one name for a site that several layers share, in the order in which they call."""
    return ",".join(names)


def names_of(joint: str) -> list[str]:
    """Return the names that a name joins; most names are alone."""
    return joint.split(",")


def call_line(node: torch.fx.Node) -> str:
    """Return `file.py:line` of the user's code that made the node, or nothing."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]}" if lines else ""


def call_names(calls: list[torch.fx.Node]) -> dict[torch.fx.Node, str]:
    """Name each call by its module path; several calls in one module count `#1`, `#2`, ..."""
    paths = {node: _path(node) for node in calls}
    total, seen, names = Counter(paths.values()), Counter[str](), {}
    for node, path in paths.items():
        seen[path] += 1
        names[node] = f"{path}#{seen[path]}" if total[path] > 1 else path
    return names


def _path(node: torch.fx.Node) -> str:
    path = module_path(node)
    return path if path and not path.startswith("@") else f"attention{path}"
