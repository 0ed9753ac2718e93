"""Run a pipeline: what every pass needs done around it happens here and in no pass."""

from __future__ import annotations

import difflib
import itertools
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch.fx

from lipass.passes.core import Note, Pass, PassContext, PassError, PassPipeline
from lipass.passes.graph.compat import trace_artifact
from lipass.passes.graph.dead_code import erase_dead
from lipass.passes.graph.names import module_path
from lipass.passes.integrity import check_integrity, snapshot
from lipass.passes.printer import print_graph
from lipass.passes.restore import SavedModule

log = logging.getLogger(__name__)

_GRAPHS = itertools.count()


@dataclass(frozen=True)
class PassRun:
    """Record one run of one pass."""

    name: str
    numerics: str
    changed: bool
    seconds: float
    """Time of the pass and of its verification."""
    notes: tuple[Note, ...]
    diff: str
    """Removed and added lines of the printed graph; empty unless dumps are on."""
    before: str = ""
    """The printed graph in front of the pass; empty unless dumps are on."""
    after: str = ""
    """The printed graph behind the pass; empty unless dumps are on."""
    failure: str = ""
    """Why the pass was undone or left out, if it was."""


def run_pipeline(
    pipeline: PassPipeline,
    gm: torch.fx.GraphModule,
    ctx: PassContext,
    *,
    diff: bool = False,
    keep_going: bool = False,
) -> list[PassRun]:
    """Run passes in order on `gm.graph`, in place.

    With `LIPASS_DUMP=dir` the graph after every pass is written to `dir/graph_<i>/01_<pass>.txt`,
    with a `.diff` beside it.

    Args:
        pipeline: the passes.
        gm: holds the graph; it gets another one where a pass is undone.
        ctx: what the passes share.
        diff: keep the text of the graph around each pass.
        keep_going: undo a pass that fails, and leave out those that require it; the graph is
            then as it was in front of it.

    Raises:
        PassError: naming the pass and, where known, the node; the cause is chained.
    """
    dump = _Dump.start()
    keep_text = diff or dump.folder is not None
    text = print_graph(gm.graph) if keep_text else ""
    dump.write("dynamo", text)
    records: list[PassRun] = []
    for one in pipeline:
        if keep_text:
            # again, because a guard of the last pass may have made symbols equal
            text = print_graph(gm.graph)
        start, first_note = time.perf_counter(), len(ctx.notes)
        failure = _missing(one, records)
        if keep_going and not failure:
            changed, failure = _run_or_undo(one, gm, ctx)
        else:
            changed = not failure and _run_one(one, gm.graph, ctx)
        if failure:
            ctx.current = one.name
            ctx.note("graph", "kept", failure)
            log.warning("pass %s was undone: %s", one.name, failure)
        seconds = time.perf_counter() - start
        log.debug("pass %s: %s in %.3f s", one.name, "changed" if changed else "same", seconds)
        lines, before = "", text
        if keep_text:
            text = print_graph(gm.graph) if changed else before
            lines = diff_text(before, text)
            dump.write(one.name, text, lines)
        if changed:
            trace_artifact(f"lipass_{one.name}", lambda: print_graph(gm.graph))
        notes = tuple(ctx.notes[first_note:])
        numerics = one.numerics.value
        records.append(
            PassRun(one.name, numerics, changed, seconds, notes, lines, before, text, failure)
        )
    gm.recompile()
    return records


def _missing(one: Pass, records: list[PassRun]) -> str:
    """Name the passes that a pass requires and that have failed, or nothing."""
    failed = [run.name for run in records if run.failure and run.name in one.requires]
    return f"left out, because it requires {', '.join(failed)}" if failed else ""


def _run_or_undo(one: Pass, gm: torch.fx.GraphModule, ctx: PassContext) -> tuple[bool, str]:
    """Run a pass; return whether it changed the graph, and why it was undone, if it was."""
    saved, notes = SavedModule.of(gm), len(ctx.notes)
    try:
        return _run_one(one, gm.graph, ctx), ""
    except PassError as error:
        saved.restore()
        del ctx.notes[notes:]
        ctx.failing = None
        return False, str(error).partition("\n")[0]


def _run_one(one: Pass, graph: torch.fx.Graph, ctx: PassContext) -> bool:
    ctx.current, ctx.failing = one.name, None
    before = snapshot(graph)
    try:
        changed = one.run(graph, ctx)
        ctx.failing = None
        if changed:
            erase_dead(graph)
            check_integrity(graph, before, ctx)
    except Exception as error:
        where = ""
        if ctx.failing is not None:
            path = module_path(ctx.failing)
            where = f" on %{ctx.failing.name}" + (f" ({path})" if path else "")
        raise PassError(f"pass {one.name!r} failed{where}: {error}") from error
    ctx.done.append(one.name)
    return changed


def diff_text(before: str, after: str) -> str:
    """Return the removed and added lines between two printed graphs."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "".join(f"{x}\n" for x in itertools.islice(lines, 2, None) if not x.startswith("@@"))


@dataclass
class _Dump:
    """Write numbered graphs to the folder in `LIPASS_DUMP`, or nothing if it is not set."""

    folder: Path | None
    index: int = 0

    @classmethod
    def start(cls) -> _Dump:
        root = os.environ.get("LIPASS_DUMP")
        if not root:
            return cls(None)
        folder = Path(root) / f"graph_{next(_GRAPHS)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _tell_unwritten(folder, error)
            return cls(None)
        return cls(folder)

    def write(self, name: str, text: str, diff: str = "") -> None:
        if self.folder is None:
            return
        stem = f"{self.index:02d}_{name.replace('-', '_')}"
        try:
            (self.folder / f"{stem}.txt").write_text(text, encoding="utf-8")
            if self.index:
                (self.folder / f"{stem}.diff").write_text(diff, encoding="utf-8")
        except OSError as error:
            _tell_unwritten(self.folder, error)
            self.folder = None
        self.index += 1


def _tell_unwritten(folder: Path, error: OSError) -> None:
    """Say that a graph is not dumped; the model is compiled all the same."""
    log.warning(
        "LIPASS_DUMP must name a folder that can be written, got %s: %s; its graph is not dumped",
        folder,
        error.strerror,
    )
