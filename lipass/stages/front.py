"""`lipass.Stages`: what makes a chunk and what shows it, one after the other or side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from lipass.errors import LipassError
from lipass.stages.apart import Apart
from lipass.stages.line import Here, Line, items_of
from lipass.stages.packet import pack, unpack
from lipass.stages.stage import Stage

_BACKENDS = ("gloo", "nccl")


class Stages:
    """A line of stages: each computes what the one before hands over, in order.

    In one process a result is computed when it is asked for. With `apart`, each stage has a
    process of its own, so that one chunk is denoised while the one before is decoded: a line then
    gives a chunk in the time of its slowest stage and the hand-over. What is computed is the same.

    Args:
        stages: in order.
        apart: give each stage a process; the script then needs `if __name__ == "__main__":`.
        depth: items that may wait in front of a stage that computes, and results in front of the
            caller. More smooths stages that take now long, now short, and makes what is asked for
            come later.
        backend: how bytes go from stage to stage when they are apart: "gloo", through the host's
            memory, or "nccl", for stages that have a CUDA device each.

    Raises:
        TypeError: no stages, or one whose `make` cannot be imported while they are apart.
        ValueError: two stages of one name, a depth below 1, or an unknown backend.
        StageError: a stage could not be made.
        LipassError: a process ended while it began, or NCCL cannot be used.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        apart: bool = False,
        depth: int = 1,
        backend: str = "gloo",
    ) -> None:
        stages = tuple(stages)
        _check(stages, depth, backend)
        if apart and not (dist.is_available() and dist.is_gloo_available()):
            raise LipassError(
                "stages apart must have torch.distributed with gloo, got a torch without it; "
                "leave out apart=True"
            )
        if apart and backend == "nccl":
            _check_nccl(stages)
        self._line: Line = (
            Apart(stages, depth, backend == "nccl") if apart else Here(stages, depth)
        )
        self._ahead = self._line.ahead

    def put(self, item: Any, *, timeout_s: float = 0.0) -> None:
        """Give the first stage an item; waits while there is no room and stages work.

        Args:
            item: tensors, numbers, text, bools, None, and tuples, lists and dicts of these. It is
                copied, here and from stage to stage.
            timeout_s: how long to wait, where no stage can make room, for another thread that
                takes a result.

        Raises:
            TypeError: an item that cannot be handed over.
            LipassError: there is no room, a process has ended, or the line is closed.
        """
        self._line.put(pack(item), timeout_s)

    def get(self, *, timeout_s: float = 0.0) -> Any:
        """Take the next result, in the order of the items; waits for it while stages work.

        In one process, an item that Ctrl-C interrupts stays the next one: another `get` goes on
        with the stage that was interrupted.

        Args:
            timeout_s: how long to wait, where nothing is under way, for another thread to put an
                item.

        Returns:
            What the last stage returned, its tensors on the host.

        Raises:
            StageError: a stage raised at this item; the next `get` gives the next one.
            LipassError: nothing is under way, a process has ended, or the line is closed.
        """
        return unpack(self._line.get(timeout_s))

    def run(self, items: Iterable[Any]) -> Iterator[Any]:
        """Put items as there is room for them, and give the results in order.

        An item is asked for only when it can be put, so what a person steers is asked for late.
        """
        for packet in items_of(self._line, self._ahead, iter(items)):
            yield unpack(packet)

    def forget(self) -> int:
        """Give up all items that were put and not taken, such as when a person steers elsewhere.

        A stage that has computed some of them learns so by its method `forget(count)`, before its
        next item: its last `count` results were never shown. `lipass.stages.is_stale` tells a
        stage that is computing, which may raise `lipass.stages.Stale`.

        Returns:
            How many items were given up.
        """
        return self._line.forget()

    @property
    def under_way(self) -> int:
        """Items that were put and neither taken nor given up."""
        return self._line.under_way

    @property
    def ready(self) -> bool:
        """Whether `get` would return at once."""
        return self._line.ready

    def close(self, *, timeout_s: float | None = None) -> None:
        """End all stages, by their method `close` where they have one; twice is fine.

        Args:
            timeout_s: what stages apart may take for the item that they compute and for their
                `close` together; None gives 5 s to the item, and to `close` what it takes. One
                that takes longer is ended by force, and a warning names it.

        Raises:
            Exception: what the `close` of a stage raised; behind all others.
        """
        self._line.close(timeout_s)

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check(stages: tuple[Stage, ...], depth: int, backend: str) -> None:
    if not stages or not all(isinstance(one, Stage) for one in stages):
        raise TypeError(
            f"stages must be one lipass.Stage or more, got {stages!r:.80}; such as "
            "[Stage('denoise', make_denoiser), Stage('decode', make_decoder)]"
        )
    names = [one.name for one in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages must have names of their own, got {names}; name them apart")
    if type(depth) is not int or depth < 1:
        raise ValueError(f"depth must be 1 or more, got {depth!r}; 1 keeps what is shown fresh")
    if backend not in _BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}; 'gloo' runs "
            "everywhere"
        )


def _check_nccl(stages: tuple[Stage, ...]) -> None:
    if not dist.is_nccl_available():
        raise LipassError(
            "backend 'nccl' must be part of this torch, got one without it; use 'gloo'"
        )
    devices = [one.device for one in stages]
    kinds = {torch.device(one).type if one else "none" for one in devices}
    if kinds != {"cuda"} or len(set(devices)) < len(devices):
        raise LipassError(
            f"backend 'nccl' must have a CUDA device for each stage, got {devices}; use 'gloo'"
        )
