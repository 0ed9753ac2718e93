"""Compare what a call of a graph reads with what the session decided for the chunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.fx

from lipass.compile.argument_sizes import ArgumentSizes, Bindings, number
from lipass.compile.sites import graphs_of
from lipass.config import Config
from lipass.passes.attention.site import OVER_LATENTS, AttentionSite, poses
from lipass.passes.core import PassPipeline
from lipass.passes.graph.compat import Size
from lipass.policy.blocks import early_step, short_context
from lipass.policy.views import check_poses
from lipass.runtime.agreement import differences, disagreement, tell
from lipass.runtime.scope import current_step
from lipass.runtime.written_slots import Placed, why_unsaid
from lipass.session import Chunk, Session


@dataclass(frozen=True)
class Reading:
    """What one call may read.

    Attributes:
        chosen: history latents that the graph has to leave the others out for; None where the
            model has done so, or nobody has. Positions in what the model holds.
        latents: how many the graph reads.
        dense_reason: why attention over the context stays dense, which is short, or the step one
            of the first; or None.
    """

    chosen: tuple[int, ...] | None = None
    latents: int = 0
    dense_reason: str | None = None


_AS_GIVEN = Reading()


class GraphReading:
    """What the calls of one compiled graph read, and whether that is what the session thinks."""

    def __init__(
        self,
        config: Config,
        pipeline: PassPipeline,
        gm: torch.fx.GraphModule,
        found: Sequence[AttentionSite],
    ) -> None:
        self._config = config
        self._able = {one.section for one in pipeline if one.section}
        over = [site for site in found if site.role in OVER_LATENTS]
        self._of_latents = bool(over)
        grids = [site.q_grid for site in over if site.q_grid]
        self._latent_tokens: Size = grids[0][1] * grids[0][2] if grids else 0
        decode = [site for site in found if site.role == "decode"]
        self._history = _history(decode[0]) if decode else None
        self._reader = decode[0].name if decode else ""
        self._slots = decode[0].slots if decode else None
        self._unordered = any(site.unordered for site in decode)
        self._prefills = any(site.role == "prefill" for site in found)
        self._sizes = ArgumentSizes(gm.graph)
        called = {node.target for graph in graphs_of(gm) for node in graph.nodes}
        self._prunes = torch.ops.lipass.view_overlap.default in called
        self._asks = torch.ops.lipass.chosen_latents.default in called
        self._merges = torch.ops.lipass.attend_merged.default in called
        always = [one for one in pipeline if one.section == "context" and one.leaves_out]
        self._sink, self._window = (
            max((getattr(one, name, 0) for one in always), default=0)
            for name in ("sink_latents", "window_latents")
        )
        inputs = gm.graph.find_nodes(op="placeholder")
        self._cameras = [(inputs.index(n), n.name, f.history_latents) for n, f in poses(gm.graph)]
        self._met: weakref.WeakSet[Session] = weakref.WeakSet()
        self._told: weakref.WeakSet[Session] = weakref.WeakSet()
        self._checked: weakref.WeakSet[Chunk] = weakref.WeakSet()
        self._latest: tuple[Callable[[], Chunk | None], Bindings, Reading]
        self._latest = (lambda: None, (), _AS_GIVEN)

    def of_call(self, chunk: Chunk | None, args: tuple[Any, ...]) -> Reading:
        """Say what a call reads, count it for the receipt, and tell where the two sides differ.

        Raises:
            LipassError: under `strict`, where a warning is given otherwise.
            ValueError: cameras that the graph chooses by and that are none.
        """
        if chunk is None or not self._of_latents:
            return _AS_GIVEN
        sizes = self._sizes(args)
        latest, of_sizes, reading = self._latest
        if latest() is not chunk or of_sizes != sizes:  # once for all steps of a chunk
            self._meet(chunk.session)
            tokens = number(self._latent_tokens, dict(sizes))
            short = short_context(self._config.sparse, len(chunk.context), tokens)
            reading = replace(self._first(chunk, args, sizes), dense_reason=short)
            self._latest = (weakref.ref(chunk), sizes, reading)
        sparse = self._config.sparse
        asks = sparse is not None and sparse.dense_steps and self._history is not None
        if not asks or reading.dense_reason is not None:
            return reading  # without asking for a step: a call behind all of them belongs to none
        step = current_step()
        early = None if step is None else early_step(sparse, step.index)
        return reading if early is None else replace(reading, dense_reason=early)

    def _meet(self, session: Session) -> None:
        if session in self._met:
            return
        if lines := differences(self._config, self._able, session.config):
            presets = self._config.preset, session.config.preset
            said = disagreement(lines, *presets, replays=session.recorded is not None)
            tell(said, strict=self._strict(session))
        self._met.add(session)  # who was refused and tries again is refused again

    def _first(self, chunk: Chunk, args: tuple[Any, ...], sizes: Bindings) -> Reading:
        session, there = chunk.session, chunk.plan.history_latents
        if not chunk.chooses:
            self._check_cameras(chunk, args, dict(sizes))
        if self._history is None or (not chunk.chooses and self._prunes):
            return _AS_GIVEN
        read, chosen = number(self._history, dict(sizes)), chunk.context
        reading = _AS_GIVEN
        why = self._out_of_order(chunk, dict(sizes), read)
        # What is merged is read, whatever was chosen; its site says so.
        if chunk.chooses and read > len(chosen) and not self._merges:
            kept = tuple(chosen)
            if read == len(chunk.held):
                kept = tuple(i for i, latent in enumerate(chunk.held) if latent in set(chosen))
            if self._asks and read == len(chunk.held) and why:
                self._tell(session, f"{why}; until then nothing is left out")
            elif self._asks and read == len(chunk.held):
                reading, read = Reading(kept, read), len(kept)
            elif read == there and self._prunes and not self._prefills:
                self._check_cameras(chunk, args, dict(sizes))
                reading = Reading(kept, there)
                window = range(max(0, there - self._window), there)
                read = len({*kept, *window, *range(min(self._sink, there))})
            else:
                said = _ignored(read, len(chosen), there, self._reader, self._asks)
                self._tell(session, said)
        chunk.latents_read = max(read, chunk.latents_read or 0)
        return reading

    def _out_of_order(self, chunk: Chunk, known: dict[str, int], read: int) -> str:
        """Say why it is not known which latent a place of the cache holds, or nothing."""
        placed, plan, written = self._placed(known), chunk.plan, chunk.session.written
        why = ""
        if placed is not None and chunk.says_held and read == len(chunk.held):
            why = written.why_not(plan.stream, plan.index, placed, chunk.held)
        elif self._unordered and not chunk.says_held:
            why = why_unsaid(placed)
        if placed is not None:
            written.add(plan.stream, plan.index, placed, plan.history_latents)
        return why

    def _placed(self, known: dict[str, int]) -> Placed | None:
        if self._slots is None:
            return None
        latent = number(self._latent_tokens, known)
        reads = [[number(end, known) for end in ends] for ends in self._slots.reads]
        sizes = [number(self._slots.capacity, known), number(self._slots.written, known)]
        if any(size % latent for size in (*sizes, *(end for ends in reads for end in ends))):
            return None  # latents do not begin where the cache does
        capacity, first = (size // latent for size in sizes)
        places = tuple((ends[0] // latent, ends[1] // latent) for ends in reads)
        return Placed(capacity, places, first, self._slots.moved)

    def _tell(self, session: Session, said: str) -> None:
        if session not in self._told:
            tell(said, strict=self._strict(session))
            self._told.add(session)

    def _strict(self, session: Session) -> bool:
        return self._config.strict or session.config.strict

    def _check_cameras(self, chunk: Chunk, args: tuple[Any, ...], known: dict[str, int]) -> None:
        """Check the cameras that the graph chooses by, once a chunk: it takes a device read."""
        if not self._prunes or chunk in self._checked:
            return
        for place, name, history in self._cameras:
            count = number(history, known)
            for w2c in args[place]:
                try:
                    check_poses(w2c[:count] if count else None, w2c[count:])
                except ValueError as error:
                    raise ValueError(
                        f"the model chooses its context by its input {name.removeprefix('l_')}: "
                        f"{error}; or leave the pass out that does, see lipass inspect"
                    ) from None
        self._checked.add(chunk)


def _history(site: AttentionSite) -> Size:
    total: Size = 0
    for segment in site.segments:
        if segment.role == "history":
            total = total + segment.grid[0]
    return total


def _ignored(read: int, chosen: int, there: int, reader: str, asks: bool) -> str:
    if asks:
        return (
            "a model must read the history latents that its session knows of, got a call of "
            f"{reader} that reads {read} of {there}, and attends to all; pass as `held` those "
            "that the cache holds, in the order in which they lie in it"
        )
    return (
        f"a model must read the history latents that its session chose, got a call of {reader} "
        f"that reads {read} where {chosen} of {there} were chosen, and attends to all; build the "
        "history from `chunk.context`, or compile with the section context and the cameras of all "
        "latents as an input [B, F, 4, 4]"
    )
