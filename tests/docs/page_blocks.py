"""Find what README and the docs ask a reader to run, and resolve what cannot run here."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import lipass
from lipass.adapters.adoption import Adoption
from lipass.runtime.chunk import Chunk
from lipass.runtime.step import Step
from lipass.stages import Stages

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "kernels/block_sparse/README.md",
]
COMMANDS = ("lipass", "make", "python", "pip", "bash")
# ruff formats what stands behind ```python, and would format an include apart.
_FENCE = re.compile(r"^```(?: \{ \.)?(\w*)(?: \})?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SNIPPET = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)
# Blocks that a test runs: page and number.
RUN = set()
# Names of the docs for objects of this project.
_OBJECTS = {
    "session": lipass.Session,
    "chunk": Chunk,
    "step": Step,
    "adoption": Adoption,
    "stages": Stages,
}


def code_of(page, language="python"):
    """Return the fenced blocks of a page, files that they include put in."""
    text = page.read_text(encoding="utf-8")
    return [
        _SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), body)
        for name, body in _FENCE.findall(text)
        if name == language
    ]


def written(page):
    """Return page and number of each python block that is no file; files have their own tests."""
    bodies = [body for name, body in _FENCE.findall(page.read_text("utf-8")) if name == "python"]
    name = page.relative_to(ROOT).as_posix()
    return {(name, i) for i, body in enumerate(bodies) if not _SNIPPET.fullmatch(body.strip())}


def block_of(page, number=0):
    """Give a test one block of a page, word for word, as `code`; it counts as run."""
    RUN.add((page, number))
    (code,) = code_of(ROOT / page)[number : number + 1]
    return pytest.mark.parametrize("code", [code], ids=[f"{page}-{number}"])


def commands_of(page):
    """Return the command lines of a page: in blocks without a language, and in backticks."""
    text = page.read_text(encoding="utf-8")
    lines = [line for body in code_of(page, "") for line in body.splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _FENCE.sub("", text).replace("\n", " "))
    for line in lines:
        for command in re.sub(r"\s#.*", "", line).split("&&"):
            words = re.sub(r"[<>|].*", "", command).split()
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if len(words) > 1 and words[0] in COMMANDS:
                yield words


def links_of(page):
    """Return the targets of a page's links and pictures that are files of the checkout."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)


def unresolved(code):
    """List names of lipass and torch that code asks for and that do not exist."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            wrong += _unknown_keywords(node)
        elif isinstance(node, ast.Attribute):
            wrong += _unknown_attribute(node)
    return wrong


def _unknown_attribute(node):
    owner = _known(node.value)
    if owner is None or hasattr(owner, node.attr) or node.attr in _fields(owner):
        return []
    return [f"{ast.unparse(node)}: no {node.attr}"]


def _unknown_keywords(call):
    function = _known(call.func)
    if not getattr(function, "__module__", "").startswith("lipass"):
        return []
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return []
    names = {one.name for one in parameters}
    given = {keyword.arg for keyword in call.keywords} - {None}
    return [f"{ast.unparse(call.func)}: no {name}" for name in given - names]


def _known(node):
    """Return what an expression of the docs stands for, if it is of lipass or torch."""
    if isinstance(node, ast.Name):
        return {"lipass": lipass, "torch": torch, **_OBJECTS}.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _known(node.value)
        return getattr(owner, node.attr, None)
    return None


def _fields(owner):
    source = inspect.getsource(owner) if inspect.isclass(owner) else ""
    return set(re.findall(r"self\.(\w+)", source)) | set(getattr(owner, "__annotations__", {}))
