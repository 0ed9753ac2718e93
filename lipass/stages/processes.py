"""Begin and end the processes of a line, and say how one has ended."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lipass.errors import LipassError
from lipass.runtime.agreement import tell
from lipass.stages.channel import Channel
from lipass.stages.line import StageError
from lipass.stages.rank import Place, serve
from lipass.stages.stage import Stage

# How long a stage may take for the item that it computes when it is asked to end, where nobody has
# said how long, and how long a process may take that is told to.
_ASKED_S, _TOLD_S = 5.0, 1.0
# How often it is looked whether another thread gives less time.
_LOOK_S = 0.1


@dataclass(eq=False)
class Rank:
    """What the caller knows of one stage.

    Attributes:
        waiting: numbers of the items in front of it.
        busy: number of the item that it computes, or None.
        held: number and text of what it has computed and not handed over, or None.
        made: whether its stage is there.
        closing: whether it has begun to close its stage.
        unclosed: what the stage raised at that, or None.
    """

    stage: Stage
    process: Any
    pipe: Connection
    waiting: set[int] = field(default_factory=set)
    busy: int | None = None
    held: tuple[int, str] | None = None
    made: bool = False
    closing: bool = False
    unclosed: tuple[str, str] | None = None

    @property
    def works(self) -> bool:
        """Whether it computes, or will without anybody's help."""
        return self.busy is not None or (bool(self.waiting) and self.held is None)

    def tell(self, *words: Any) -> None:
        """Say something to it."""
        with contextlib.suppress(OSError):  # that it has ended is told once, elsewhere
            self.pipe.send_bytes(json.dumps(words).encode())

    def note(self, word: str, *rest: Any) -> None:
        """Remember what it says of its begin and end."""
        self.made |= word == "ready"
        self.closing |= word == "closing"
        if word == "unclosed":
            self.unclosed = rest[0], rest[1]

    def hear_to_the_end(self) -> None:
        """Read what it has said, of which nothing but its end matters now."""
        with contextlib.suppress(OSError, EOFError):
            while self.pipe.poll():
                self.note(*json.loads(self.pipe.recv_bytes()))


class Processes:
    """One process for each stage, and what goes between them.

    Args:
        stages: in order; `make` of each can be imported.
        direct: whether bytes go from device to device.

    Raises:
        StageError: a stage could not be made.
        LipassError: a process has ended before it was ready.
    """

    def __init__(self, stages: tuple[Stage, ...], direct: bool) -> None:
        self.ranks: list[Rank] = []
        self._folder = Path(tempfile.mkdtemp(prefix="lipass-stages-"))
        self._ending = threading.Lock()
        self._until: float | None = None
        try:
            self._begin(stages, direct)
            for rank in self.ranks:
                self._expect(rank, "here")
            self.channel = self._connect()
            for rank in self.ranks:
                self._expect(rank, "ready")
        except BaseException:
            self.end(0)
            raise

    def _begin(self, stages: tuple[Stage, ...], direct: bool) -> None:
        context, size = multiprocessing.get_context("spawn"), len(stages) + 1
        share = max(torch.get_num_threads() // len(stages), 1)
        devices = tuple(str(one.device) for one in stages) if direct else None
        for i, stage in enumerate(stages):
            place = Place(stage, i + 1, size, stage.threads or share, self._folder, devices)
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(place, theirs), name=f"lipass-stage-{stage.name}"
            )
            process.start()
            theirs.close()
            self.ranks.append(Rank(stage, process, ours))

    def _expect(self, rank: Rank, word: str) -> None:
        """Wait for the first words of a process.

        Raises:
            StageError: the stage could not be made.
            LipassError: a process has ended.
        """
        while not rank.pipe.poll():
            wait([rank.pipe, *(one.process.sentinel for one in self.ranks)])
            self._check_alive(rank)
        try:
            got, *rest = json.loads(rank.pipe.recv_bytes())
        except (EOFError, OSError):
            raise self.ended() from None
        if got == "unmade":
            raise StageError(rank.stage.name, -1, *rest)
        assert got == word, (got, word)
        rank.note(got)

    def _check_alive(self, asked: Rank | None = None) -> None:
        """Raise where a process has ended, unless the one that is asked has said something."""
        dead = [one for one in self.ranks if not one.process.is_alive()]
        if dead and not (asked and asked.pipe.poll()):
            raise next(filter(None, map(_unmade, dead)), None) or self.ended()

    def _connect(self) -> Channel:
        """Join the group; a process that ends meanwhile would be waited for in vain."""
        found: list[Channel | RuntimeError] = []

        def join() -> None:
            try:
                found.append(Channel(self._folder, 0, len(self.ranks) + 1))
            except RuntimeError as error:
                found.append(error)

        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        while not found:
            thread.join(0.05)
            self._check_alive()
        if isinstance(found[0], RuntimeError):
            raise found[0]
        return found[0]

    def ended(self, under_way: int | None = None, error: object = None) -> LipassError:
        """Say which process has ended, and how.

        Args:
            under_way: items that are lost by it; None while stages are being made.
            error: what else is known.
        """
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            codes = [one.process.exitcode for one in self.ranks]
            if any(code for code in codes):
                break
            time.sleep(0.02)
        dead = [one for one in self.ranks if one.process.exitcode]
        dead += [one for one in self.ranks if not one.process.is_alive()]
        if not dead:
            return LipassError(f"stages must be able to hand over, got {error}; make them anew")
        code = dead[0].process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        hint = "make the stages anew"
        if how == "SIGKILL":
            hint += "; where nobody killed it, memory ran out"
        elif under_way is None:
            hint += "; what it printed says why, and a script that makes stages must do so under "
            hint += "`if __name__ == '__main__':`"
        return LipassError(
            f"a stage must live as long as its line, got stage {dead[0].stage.name!r} ended by "
            f"{how} with {under_way or 0} items under way; {hint}"
        )

    def end(self, number: int, timeout_s: float | None = None) -> StageError | None:
        """End every process: asked first, then told, then killed; nobody else hears them now.

        Args:
            number: of the item that would have been next.
            timeout_s: how long they may take; None gives an item `_ASKED_S`, and the `close` of a
                stage as long as it takes. Another thread that waits here is told so too.

        Returns:
            What the `close` of a stage raised.
        """
        if timeout_s is not None:
            self._until = time.monotonic() + timeout_s
        with self._ending:
            for one in self.ranks:
                one.tell("close")
            try:
                self._wait_for_ends(time.monotonic() + _ASKED_S)
            finally:
                self._end_by_force()
            for one in self.ranks:
                one.hear_to_the_end()
            shutil.rmtree(self._folder, ignore_errors=True)
        raised = ((one.stage.name, one.unclosed) for one in self.ranks if one.unclosed)
        return next((StageError(name, number, *what) for name, what in raised), None)

    def _wait_for_ends(self, item_until: float) -> None:
        while alive := [one for one in self.ranks if one.process.is_alive()]:
            for one in alive:
                one.hear_to_the_end()
            closing = any(one.closing for one in alive)
            until = self._until if self._until is not None else item_until
            late = time.monotonic() >= until
            if late and (self._until is not None or not closing):
                return
            ends = [one.process.sentinel for one in alive]
            wait([*ends, *(one.pipe for one in alive)], _LOOK_S)

    def _end_by_force(self) -> None:
        late = [one for one in self.ranks if one.made and one.process.is_alive()]
        for end in ("terminate", "kill"):
            for one in self.ranks:
                if one.process.is_alive():
                    getattr(one.process, end)()
            _join(self.ranks, _TOLD_S)
        if late:
            names = ", ".join(
                f"{one.stage.name!r} {'in its close' if one.closing else 'at an item'}"
                for one in late
            )
            tell(
                f"stages must end when they are asked to, got {names}, ended by force; ask "
                "lipass.stages.is_stale() between two steps, or close(timeout_s=...) with more "
                "time",
                strict=False,
            )


def _unmade(rank: Rank) -> StageError | None:
    """Read from the pipe of a process that has ended why its stage could not be made."""
    with contextlib.suppress(OSError, EOFError):
        while rank.pipe.poll():
            word, *rest = json.loads(rank.pipe.recv_bytes())
            if word == "unmade":
                return StageError(rank.stage.name, -1, *rest)
    return None


def _join(ranks: list[Rank], within_s: float) -> None:
    until = time.monotonic() + within_s
    for one in ranks:
        one.process.join(max(until - time.monotonic(), 0.0))
