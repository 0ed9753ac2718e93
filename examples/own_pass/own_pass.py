"""Drop dropout that drops nothing, as a pass of one's own; see pyproject.toml beside this file."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph
from torch.nn import functional as F

from lipass.passes.core import Numerics, Pass, PassContext


@dataclass(frozen=True)
class DropDropout(Pass):
    """Remove `dropout(%x, p, training=False)`, which returns its input."""

    name: ClassVar[str] = "drop-dropout"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Use the input of each call in its place; dead code is the runner's business."""
        changed = False
        for node in ctx.visit(graph.find_nodes(op="call_function", target=F.dropout)):
            p, training, inplace = dropout_arguments(*node.args[1:], **node.kwargs)
            if training or inplace:
                ctx.note(node.name, "kept", "it is for training" if training else "it is in place")
                continue
            ctx.note(node.name, "rewritten", f"dropout of {p} outside of training is nothing")
            node.replace_all_uses_with(node.args[0])
            changed = True
        return changed


def dropout_arguments(p=0.5, training=True, inplace=False, **_):
    """Give the arguments of `F.dropout` their defaults."""
    return p, training, inplace
