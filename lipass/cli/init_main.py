"""Write the rest of a draft: its questions, what runs it, and what it imports."""

from __future__ import annotations

import ast
import builtins
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lipass.cli.init_find import Rollout
from lipass.cli.init_syntax import assigned, loaded

_WALK = 'parse_trajectory("left-15, right-16")'


@dataclass
class Draft:
    """The text of a draft, and what it leaves open, in the order of the text."""

    text: str
    questions: list[str] = field(default_factory=list)


class Questions:
    """Number what only the author of the model can answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, text: str) -> list[str]:
        """Return the question as lines of a comment."""
        self.asked.append(text)
        return textwrap.wrap(
            f"Open {len(self.asked)}: {text}",
            80,
            initial_indent="# ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def main_of(tree: ast.Module, one: Rollout, questions: Questions) -> str:
    """Write what rolls out dense and accelerated, as far as it can be known."""
    arguments = one.function.args
    wanted = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
    wanted = wanted[: len(wanted) - len(arguments.defaults)]
    wanted += [
        a.arg
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if d is None
    ]
    keywords = {a.arg for a in arguments.kwonlyargs}
    root, _, attribute = one.model.partition(".")
    lines = ["def main():", '    """Roll out dense and accelerated, and say what was done."""']
    for name in wanted:
        lines += [f"    {line}" for line in _argument(tree, one, name, root, attribute, questions)]
    if root not in wanted:
        asked = questions.ask(f"`{one.model}`: how is it made, with its weights?")
        lines += [f"    {line}" for line in [*asked, f"{root} = ..."]]
    given = ", ".join(f"{n}={n}" if n in keywords else n for n in wanted)
    lines += [
        '    for options in ({"preset": "off"}, OPTIONS):',
    ]
    compiled = 'torch.compile({}, backend="light_interaction", options=options)'
    if attribute:
        lines.insert(-1, f"    model = {one.model}")
        lines.append(f"        {one.model} = {compiled.format('model')}")
    else:
        lines.append(f"        compiled = {compiled.format(root)}")
        given = ", ".join("compiled" if part == root else part for part in given.split(", "))
        given = given.replace(f"{root}={root}", f"{root}=compiled")
    roll = f"{one.function.name}({given}{', ' if given else ''}session=session)"
    generates = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(one.function))
    roll = f"list({roll})" if generates else roll
    lines += [
        "        for _ in range(2):  # the first one compiles",
        "            begin = time.perf_counter()",
        "            with lipass.Session(**options) as session:",
        f"                {roll}",
        '            print(options["preset"], f"{time.perf_counter() - begin:.2f} s")',
        "    print(lipass.report().table())",
    ]
    return "\n".join(lines)


def _argument(
    tree: ast.Module, one: Rollout, name: str, root: str, attribute: str, questions: Questions
) -> list[str]:
    made, asked = "...", "what your own script passes"
    if name == root:
        kind = one.owner if attribute else _only_model(tree)
        asked = "how is it made, with its weights?"
        if kind and not attribute:
            made = f"{kind}().eval()"
        elif kind:
            made = f"{kind}(...)"
    elif name in one.poses and one.past.startswith(f"{name}["):
        made, asked = _WALK, "a walk of your own; this one turns out and back"
    return [*questions.ask(f"`{name}`: {asked}"), f"{name} = {made}"]


def _only_model(tree: ast.Module) -> str:
    """Name the module that no other one is made of, if it is made without arguments."""
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(b) for b in node.bases)
    ]
    inside = {name for node in classes for name in loaded(node)}
    outer = [node for node in classes if node.name not in inside]
    if len(outer) != 1:
        return ""
    for node in outer[0].body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            given = len(node.args.args) - 1 - len(node.args.defaults)
            return outer[0].name if given == 0 else ""
    return outer[0].name


def imports_of(path: Path, tree: ast.Module, body: str, one: Rollout) -> str:
    """Import what the draft uses: as the user's file does, or from it."""
    draft = ast.parse(body)
    names = loaded(draft) - {n.name for n in draft.body if hasattr(n, "name")} - {"OPTIONS"}
    names -= {n for n in assigned(draft) if n not in loaded(tree) | assigned(tree)}
    lines = {"import lipass", "import time", "import torch"}
    own: list[str] = []
    taken: dict[str, list[str]] = {}
    for name in sorted(names - {"lipass", "time", "torch"}):
        found = next((n for n in tree.body if _binds(n, name)), None)
        if isinstance(found, ast.Import | ast.ImportFrom):
            alias = next(a for a in found.names if (a.asname or a.name).split(".")[0] == name)
            if isinstance(found, ast.Import):
                lines.add(ast.unparse(ast.Import([alias])))
            else:
                module = "." * found.level + (found.module or "")
                taken.setdefault(module, []).append(ast.unparse(alias))
        elif found is not None:
            own.append(name)
        elif name == "parse_trajectory":
            taken["lipass.policy.trajectory"] = [name]
    package = (path.parent / "__init__.py").exists()
    local = {f"from {'.' if package else ''}{path.stem} import {', '.join(own)}"} if own else set()
    joined = {f"from {m} import {', '.join(sorted(n))}" for m, n in taken.items()}
    local |= {line for line in joined if line.startswith("from .")}
    lines |= local | joined
    return "\n\n".join("\n".join(group) for group in _sorted(lines, local))


def _sorted(lines: set[str], own: set[str]) -> Iterator[list[str]]:
    """Group imports as is usual: Python's, those of packages, the file's own."""

    def place(line: str) -> int:
        module = line.split()[1]
        root = module.partition(".")[0]
        return 0 if root in sys.stdlib_module_names else 2 if line in own else 1

    ordered = sorted(lines, key=lambda line: (line.startswith("from"), line.split()[1].lower()))
    for number in range(3):
        if group := [line for line in ordered if place(line) == number]:
            yield group


def is_bound(tree: ast.Module, name: str) -> bool:
    """Whether a module has a name that another one can import."""
    return any(_binds(node, name) for node in tree.body)


def _binds(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
        return False  # nothing that another file could import
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any((a.asname or a.name).split(".")[0] == name for a in node.names)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    return name in assigned(node) and name not in dir(builtins)
