"""Know which session, chunk and step a model call belongs to.

A `with` block is open for what runs inside of it. Two things say what runs inside:

- a context variable, which tasks and copied contexts inherit, lists the blocks entered in it;
- the frame that entered a block is on the stack of the calls made inside of it, whatever context
  or order blocks of interleaved generators, tasks and threads are entered in.

Where neither says anything, as in a thread that no block was entered in, a call belongs to the
only chunk that is open in the process, if there is one: an executor computes for its loop.

A block that was entered inside another one hides it. Of blocks that do not hide each other, those
whose frame is on the stack count, the nearest first. Where several are left, nobody can tell, and
who needs to know raises.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from lipass.errors import LipassError
from lipass.switch import frames_above, is_off, is_off_at

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk
    from lipass.runtime.step import StepState
    from lipass.session import Session


@dataclass(eq=False)
class Block:
    """One open `with` block: of a session, and perhaps of a chunk, a step or a branch of it."""

    session: Session
    chunk: Chunk | None = None
    step: StepState | None = None
    branch: str | None = None
    frame: FrameType | None = None
    """Frame that entered the block; None once it is closed."""
    hides: frozenset[Block] = field(default=frozenset(), repr=False)
    """Blocks inside of which this one was entered."""
    off: bool = False
    """Whether it was entered inside of `lipass.disabled()`."""


_here: contextvars.ContextVar[tuple[Block, ...]] = contextvars.ContextVar("lipass", default=())
_everywhere: list[Block] = []
_lock = threading.Lock()


def enter(block: Block, depth: int = 1) -> None:
    """Open a block for the frame `depth` above the caller."""
    frame = sys._getframe(depth + 1)
    on_stack = _depths(frame)
    outer = [one for one in _here.get() if one.frame in on_stack]
    block.frame, block.off = frame, is_off()
    block.hides = frozenset(one for one in outer if _is_inside(block, one))
    _here.set((*(one for one in _here.get() if one.frame is not None), block))
    with _lock:
        _everywhere.append(block)


def leave(block: Block) -> None:
    """Close a block, in whatever context and order."""
    block.frame = None
    block.hides = frozenset()
    _here.set(tuple(one for one in _here.get() if one.frame is not None))
    with _lock:
        if block in _everywhere:
            _everywhere.remove(block)


def latest(blocks: list[Block]) -> Block:
    """Return which of some open blocks ends here: threads that share a session enter their own."""
    entered = _here.get()
    return ([one for one in blocks if one in entered] or blocks)[-1]


def _is_inside(block: Block, outer: Block) -> bool:
    """Whether a block is inside another one, and not beside it as chunks of two users are."""
    if outer.chunk is None or block.step is not None:
        return True
    if block.chunk is None:
        return block.branch is None  # a session inside of a chunk
    if outer.step is not None or outer.chunk.active is not None:
        return True
    return any(
        outer in one.hides
        for one in _here.get()
        if one.chunk is None and one.branch is None and one.session is block.session
    )


def _depths(frame: FrameType | None) -> dict[FrameType, int]:
    return {one: depth for depth, one in enumerate(frames_above(frame))}


def _running(of: Callable[[Block], bool]) -> list[Block]:
    """List the blocks of a kind that the caller runs in; more than one if nobody can tell."""
    if not _everywhere or is_off():
        return []
    blocks = [one for one in _here.get() if one.frame is not None and of(one)]
    if len(blocks) == 1:
        return blocks
    depths = _depths(sys._getframe(1))
    if not blocks:  # another context than the one that the blocks were entered in
        with _lock:
            blocks = [one for one in _everywhere if one.frame in depths and of(one)]
    if not blocks and not _here.get():
        blocks = _of_the_only_chunk(of)
    hidden = {one for block in blocks for one in block.hides}
    blocks = [one for one in blocks if one not in hidden]
    near = [one for one in blocks if one.frame in depths]
    if len(blocks) > 1 and near:
        nearest = min(depths[one.frame] for one in near if one.frame is not None)
        blocks = [one for one in near if one.frame and depths[one.frame] == nearest]
    return blocks


def only_chunk_is_off() -> bool:
    """Whether a thread that no block was entered in computes for a chunk that is switched off."""
    if _here.get():
        return False
    blocks = _of_the_only_chunk(lambda one: one.chunk is not None)
    return any(one.off or is_off_at(one.frame) for one in blocks)


def _of_the_only_chunk(of: Callable[[Block], bool]) -> list[Block]:
    with _lock:
        blocks = [one for one in _everywhere if one.chunk is not None]
    if len({one.chunk for one in blocks}) != 1:
        return []
    return [one for one in blocks if of(one)]


def current() -> Session | None:
    """Give the session that the caller runs in; None outside of all."""
    blocks = _running(lambda one: one.branch is None)
    return blocks[-1].session if blocks else None


def current_chunk() -> Chunk | None:
    """Give the chunk that the caller runs in; None outside of chunks.

    Raises:
        LipassError: several chunks are open side by side and none of them has a step to itself.
    """
    blocks = _running(lambda one: one.chunk is not None)
    if len(blocks) > 1:
        blocks = [one for one in blocks if _step(one) is not None] or blocks
    if len(blocks) > 1:
        raise LipassError(
            f"a model call must belong to one chunk, got open chunks of {_streams(blocks)}; "
            "call the model inside `with step:`, or open one chunk at a time"
        )
    return blocks[0].chunk if blocks else None


def current_step() -> StepState | None:
    """Give the step that a model call belongs to; None outside of steps.

    Raises:
        LipassError: steps of several chunks are open and none is entered with `with step:`; or
            the steps of the chunk were taken as a list, so that none is open.
    """
    if not _everywhere:
        return None
    blocks = _running(lambda one: one.chunk is not None)
    found = [one for one in blocks if _step(one) is not None]
    if len(found) > 1:
        raise LipassError(
            f"a model call must belong to one step, got open steps of {_streams(found)}; "
            "call the model inside `with step:`"
        )
    if found:
        return _step(found[0])
    for one in blocks:
        assert one.chunk is not None
        one.chunk.refuse_listed_steps()
    return None


def branch_name(session: Session) -> str:
    """Name the innermost open branch of a session; "" outside of branches."""
    names = [one.branch for one in _here.get() if one.session is session and one.frame]
    return next((name for name in reversed(names) if name is not None), "")


def _step(block: Block) -> StepState | None:
    return block.step or (block.chunk.active if block.chunk is not None else None)


def _streams(blocks: Iterable[Block]) -> str:
    names = ", ".join(repr(one.chunk.plan.stream) for one in blocks if one.chunk is not None)
    return f"streams {names}"
