"""Work around faults of torch that would make the result of Inductor wrong, while they last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

# The import registers the operator that the pass inserts.
import lipass.kernels.copied  # noqa: F401
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.exact.faulty_forms import (
    copies_of_written,
    rearranging_writes,
    scatters_of_written,
    softmaxes_between_products,
)
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.inductor_probe import Program, goes_wrong
from lipass.passes.graph.marks import skip_stage
from lipass.passes.graph.names import call_line, module_path

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """One fault of torch: where it shows, what is done there, and whether it is still there."""

    issue: str
    what: str
    """What Inductor does, as the end of a sentence about a place."""
    matches: Callable[[Graph], Iterator[Node]]
    stage: str
    """The stage of Inductor that the graph is compiled without."""
    probes: tuple[tuple[Program, tuple[Shape, ...]], ...]
    """Small programs that this torch computes wrongly, with the shapes of their arguments."""
    copied: int | None = None
    """Which operand of the matched calls is copied as well; None for no copy."""
    is_in_code: bool = False
    """Whether only generated code has it, which takes too long to try; it is taken to last."""

    def lasts(self) -> bool:
        """Whether the torch of this process still has it; tried once, where it matters."""
        return self.is_in_code or any(
            goes_wrong(program, *shapes) for program, shapes in self.probes
        )


@dataclass(frozen=True)
class AvoidFaults(Pass):
    """Compile what this torch is known to compute wrongly without the stage that is at fault.

    Calls that build on memory which is written later get a copy, everything else stays::

        %y = slice_scatter(%cache, %k, 1, 0, 8);  %z = %cache.zero_()

        %copied = lipass.copied(%cache)
        %y = slice_scatter(%copied, %k, 1, 0, 8);  %z = %cache.zero_()

    A write of a cache to itself in another order, such as a roll, gets a copy of what it writes::

        %y = %cache.mT.roll(1, 2).mT;  %z = %cache.copy_(%y)

        %copied = lipass.copied(%y);  %z = %cache.copy_(%copied)

    Faults of Inductor's passes have small programs that tell whether this torch still has them.
    They run once a process, and only where a graph has the form, so that the workaround ends when
    the fault does. Notes name the line of the user's code.

    Keeps: graphs without such forms, which cost nothing; inner compilers other than Inductor.
    """

    name: ClassVar[str] = "avoid-faults"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    precedes: ClassVar[tuple[str, ...]] = ("hoist-calls", "share-blocks")

    inner: str = "inductor"
    """The inner compiler; all faults are of Inductor."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"inner": options["inner"]} if "inner" in options else {}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        if self.inner != "inductor":
            return False
        changed = False
        for fault in FAULTS:
            found = list(fault.matches(graph))
            if not found or not fault.lasts():
                continue
            skip_stage(graph, fault.stage)
            if fault.copied is not None:
                for node in ctx.visit(found):
                    _copy_operand(node, fault.copied, ctx)
                changed = True
            for node in found:
                line = call_line(node)
                ctx.note(
                    module_path(node) or node.name,
                    "kept" if fault.copied is None else "rewritten",
                    f"{line}{line and ': '}Inductor {fault.what} ({fault.issue}); "
                    f"compiled without {fault.stage}",
                )
        return changed


def _copy_operand(node: Node, place: int, ctx: PassContext) -> None:
    given: Any = node.args[place] if node.args else node.kwargs["input"]
    node.replace_input_with(given, Emitter(node, ctx)(torch.ops.lipass.copied.default, given))


def _shift(cache: torch.Tensor) -> None:
    cache[1:].copy_(cache[:-1].clone())


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def _write_to_a_copy(cache: torch.Tensor) -> torch.Tensor:
    copy = cache.clone()
    copy[1:3].fill_(7.0)
    cache.zero_()
    return copy


def _scatter(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    new = torch.slice_scatter(cache, rows, 0, 1, 3)
    cache.zero_()
    return new


def _over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1) * 0.2).softmax(-2) @ v


def _keys_permuted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.permute(0, 2, 3, 1) * 0.2).softmax(-1) @ v


_HEADS = (1, 2, 16, 8)

FAULTS = (
    Fault(
        "pytorch#197829, pytorch#198131",
        "reads what was copied out of this memory after it is written",
        copies_of_written,
        "REMOVE_NOOP_OPS",
        ((_shift, ((8, 4),)), (_swap, ((8, 4), (8, 4))), (_write_to_a_copy, ((8, 4),))),
    ),
    Fault(
        "pytorch#198094",
        "puts the result in the memory of its input, which is written later",
        scatters_of_written,
        "REMOVE_NOOP_OPS",
        ((_scatter, ((8, 4), (2, 4))),),
        copied=0,
    ),
    Fault(
        "seen with torch 2.13.0",
        "writes to memory while it reads it in another order",
        rearranging_writes,
        "REMOVE_NOOP_OPS",
        (),
        copied=-1,
        is_in_code=True,
    ),
    Fault(
        "pytorch#195320, pytorch#196468",
        "takes a softmax over any axis, and keys in any order, for attention",
        softmaxes_between_products,
        "PASS_PATTERN_0",
        ((_over_queries, (_HEADS,) * 3), (_keys_permuted, (_HEADS, (1, 16, 2, 8), _HEADS))),
    ),
)
"""The known faults; a test fails where the pinned torch has one no more."""
