"""Ask a syntax tree which names it binds, reads and calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield the functions of a module and the methods of its classes, with the class or ""."""
    for node in tree.body:
        if isinstance(node, Function):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            for inside in node.body:
                if isinstance(inside, Function):
                    yield node.name, inside


def level_pairs(body: ast.AST, index: str) -> str:
    """Name the list of which a step takes `[i]` and `[i + 1]`, or ""."""
    plain = {ast.unparse(n.value) for n in _items(body) if ast.unparse(n.slice) == index}
    following = {
        ast.unparse(n.value) for n in _items(body) if ast.unparse(n.slice) == f"{index} + 1"
    }
    both = sorted(plain & following)
    return both[0] if both else ""


def _items(body: ast.AST) -> Iterator[ast.Subscript]:
    return (node for node in ast.walk(body) if isinstance(node, ast.Subscript))


def calls(node: ast.AST) -> list[ast.Call]:
    """List the calls below a node."""
    return [one for one in ast.walk(node) if isinstance(one, ast.Call)]


def assigned(node: ast.AST) -> set[str]:
    """List the names that are bound below a node."""
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def loaded(node: ast.AST) -> set[str]:
    """List the names that are read below a node."""
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }


def names_in(node: ast.AST) -> set[str]:
    """List the names below a node."""
    return {n.id for n in _name_nodes(node)}


def _name_nodes(node: ast.AST) -> Iterator[ast.Name]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Name))


def receivers(body: ast.Module, call: ast.Call) -> set[str]:
    """List the names that are given what a call returns."""
    return {
        name
        for node in ast.walk(body)
        if isinstance(node, ast.Assign) and any(one is call for one in ast.walk(node.value))
        for aim in node.targets
        for name in names_in(aim)
    }


def derived_from(body: ast.Module, names: set[str]) -> set[str]:
    """Add what is computed from names."""
    found = set(names)
    for _ in range(3):
        for node in ast.walk(body):
            if isinstance(node, ast.Assign) and names_in(node.value) & found:
                found |= {n for aim in node.targets for n in names_in(aim) if n != "self"}
    return found
