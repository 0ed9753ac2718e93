"""Write a script for each graph that compares it with what the passes made of it.

The script holds both graphs as readable code and runs anywhere with torch, and with lipass where
the passes put its operators in: no repository, no model, no weights.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipass._version import VERSION
from lipass.cli.outputs import check_folder, write_all
from lipass.cli.repro_inputs import NotWritable, drawn_input, megabytes, poses_of, tolerance_of
from lipass.errors import LipassError

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

    from lipass.cli.tracing import TracedGraph
    from lipass.passes.core import PassPipeline

_HEAD = '''\
"""Compare graph {index} of {target} in front of and behind these passes:

{pipeline}

Inputs and parameters are random numbers of the shapes, strides and dtypes that were traced,
{size}; matrices are divided by the root of their last size. Budgets are 1.0 and every latent
is kept, so that what approximates has to compute the same; change BUDGET_* to see what it leaves
out. Everything runs on the CPU. The exit code is 1 if the graphs differ.

Written by lipass {version} for torch {torch}.
"""
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--emit-repro`."""
    parser.add_argument(
        "--emit-repro",
        type=Path,
        metavar="DIR",
        help="write a script for each graph that runs it before and after the passes, on random "
        "inputs, and compares; -o pipeline=PASS,.. narrows it down to some passes",
    )


class Repros:
    """Collect the scripts of a trace, and write them when it is complete."""

    def __init__(self, folder: Path | None, target: str, pipeline: PassPipeline) -> None:
        check_folder(folder, "--emit-repro")
        self.folder, self.target, self.pipeline = folder, target, pipeline
        self.clear()

    def clear(self) -> None:
        """Forget all graphs."""
        self._scripts: list[str | NotWritable] = []

    def add(self, traced: TracedGraph) -> None:
        """Write one graph down while Dynamo still has its symbols."""
        if self.folder is None:
            return
        try:
            script = script_of(traced, len(self._scripts), self.target, self.pipeline)
        except NotWritable as error:
            # Raised here it would look like a failure of the model.
            self._scripts.append(error)
        else:
            self._scripts.append(script)

    def write(self) -> None:
        """Write the scripts, `graph_0.py` and so on.

        Raises:
            LipassError: for what cannot be written, as a script or to the disk, behind the others.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_all(
            (self.folder / f"graph_{index}.py", partial(str, script))
            for index, script in enumerate(self._scripts)
            if isinstance(script, str)
        )
        for index, script in enumerate(self._scripts):
            if isinstance(script, NotWritable):
                raise LipassError(f"graph {index} cannot be written as a script: {script}")


def script_of(traced: TracedGraph, index: int, target: str, pipeline: PassPipeline) -> str:
    """Return the text of the script of one graph.

    Raises:
        NotWritable: if the graph holds something that code cannot spell.
    """
    import torch

    from lipass.cli import repro_harness

    classes = _Classes()
    classes.add("Before", traced.original)
    classes.add("After", traced.rewritten)
    poses = {node.name for node, _ in poses_of(traced.facts.graph)}
    inputs = traced.original.graph.find_nodes(op="placeholder")
    drawn = "".join(f'        "{node.name}": {drawn_input(node, poses)},\n' for node in inputs)
    head = _HEAD.format(
        index=index,
        target=target,
        pipeline=textwrap.indent("\n".join(str(pipeline).split(",")) or "none", "    "),
        size=megabytes(inputs),
        version=VERSION,
        torch=torch.__version__,
    )
    _, _, harness = inspect.getsource(repro_harness).partition("\nfrom __future__")
    call = f"compare(Before(), After(), inputs(), tolerance={tolerance_of(traced)})"
    if classes.uses_lipass:
        classes.imports |= {
            "import lipass.compile.unit  # registers the operators",
            "from lipass.runtime.chosen_context import chosen_by_caller",
        }
        call = f"with chosen_by_caller():  # every latent is kept\n        code = {call}"
    else:
        call = f"code = {call}"
    parts = [
        head + f"from __future__{harness.rstrip()}",
        "\n".join(sorted(classes.imports)),
        "".join(f"{line}\n" for line in sorted(classes.constants)),
        *classes.texts,
        f"def inputs():\n    return {{\n{drawn}    }}\n",
        f'if __name__ == "__main__":\n    {call}\n    raise SystemExit(code)\n',
    ]
    return "\n\n".join(part for part in parts if part)


class _Classes:
    """Write graphs as classes, the graphs that they call in front of them."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.imports: set[str] = set()
        self.constants: set[str] = set()
        self.uses_lipass = False

    def add(self, name: str, gm: GraphModule) -> None:
        """Write a graph and those that it calls."""
        from torch.fx import GraphModule

        graph = self._spelled(gm.graph)
        made = []
        for path in dict.fromkeys(str(n.target) for n in graph.nodes if _is_attribute(n)):
            inner = getattr(gm, path, None)
            if not isinstance(inner, GraphModule):
                raise NotWritable(
                    f"attributes must be graphs, got {path!r} of kind {type(inner).__name__}; "
                    "pass it as an argument of the model"
                )
            child = name + "".join(part.capitalize() for part in re.split(r"\W|_", path))
            self.add(child, inner)
            made.append(f"        self.{path} = {child}()")
        code = graph.python_code("self", verbose=True)
        self._import(code.globals)
        lines = [f"class {name}(torch.nn.Module):"]
        if made:
            lines += ["    def __init__(self):", "        super().__init__()", *made, ""]
        lines.append(textwrap.indent(_wrapped(code.src.strip()), "    "))
        self.texts.append("\n".join(lines) + "\n")

    def _spelled(self, graph: Graph) -> Graph:
        """Copy a graph; the copy runs on the CPU, at budgets that have names."""
        from dataclasses import replace

        import torch
        from torch.fx import Graph
        from torch.fx.node import map_aggregate

        from lipass.passes.attention.sparse_call import SparseCall

        copy = Graph()
        copy.output(copy.graph_copy(graph, {}))
        for node in copy.nodes:
            node.type = None
            if node.op == "placeholder":
                node.target = node.name
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _on_cpu)
            if node.target == "cuda":
                node.target = "cpu"
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            self.uses_lipass |= node.target.namespace == "lipass"
            if SparseCall.is_one(node):
                call = SparseCall.of(node)
                budget = _Budget(call.budget)
                self.constants.add(f"{budget} = 1.0  # {float(budget)} in the compiled graph")
                replace(call, budget=budget).write(node)
        return copy

    def _import(self, names: dict[str, Any]) -> None:
        """Import what the code refers to by the names it has there."""
        import torch

        for name, thing in names.items():
            if thing is torch or name == "torch":
                self.imports.add("import torch")
            elif name in ("inf", "nan"):
                self.imports.add(f"from math import {name}")
            elif name == "NoneType":
                self.imports.add("from types import NoneType")
            elif inspect.ismodule(thing):
                self.imports.add(f"import {thing.__name__} as {name}")
            else:
                module, own = getattr(thing, "__module__", None), getattr(thing, "__name__", "")
                if module is None or "." in getattr(thing, "__qualname__", own):
                    raise NotWritable(
                        f"calls must be importable, got {thing!r}; move it to the top of a module"
                    )
                self.imports.add(f"from {module} import {own} as {name}")


class _Budget(float):
    """A budget that is written as the name of a constant."""

    def __repr__(self) -> str:
        return "BUDGET_" + f"{float(self):g}".replace(".", "_")

    __str__ = __repr__


def _is_attribute(node: Node) -> bool:
    return node.op in ("get_attr", "call_module")


def _on_cpu(arg: Any) -> Any:
    import torch

    if isinstance(arg, torch.device) or (isinstance(arg, str) and arg.startswith("cuda")):
        return torch.device("cpu")
    return arg


def _wrapped(code: str) -> str:
    """Put each argument of `def forward(self, a: "f32[2, 4]", ..):` on a line of its own."""
    head, _, body = code.partition("\n")
    names = re.findall(r'(?:[^,"]|"[^"]*")+', head.partition("(")[2].rpartition(")")[0])
    arguments = "".join(f"    {name.strip()},\n" for name in names)
    return f"def forward(\n{arguments}):\n{body}"
