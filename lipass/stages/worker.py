"""Compute with one stage, wherever it runs, and remember what it has made that nobody has seen."""

from __future__ import annotations

import traceback
from collections import deque
from dataclasses import dataclass

import torch

from lipass.stages.now import Job, computing
from lipass.stages.packet import Packet, pack, unpack
from lipass.stages.stage import Stage

# More results than these are never given up at once.
_REMEMBERED = 1024


@dataclass(frozen=True)
class Failure:
    """What a stage raised, as plain data."""

    stage: str
    kind: str
    told: str

    @classmethod
    def of(cls, stage: str, error: Exception) -> Failure:
        """Describe an exception."""
        told = "".join(traceback.format_exception(error)).rstrip()
        return cls(stage, type(error).__name__, told)


class Worker:
    """A stage that has been made.

    Args:
        stage: what it is made by; its `make` may raise.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._computes = stage.made()
        self._returned: deque[int] = deque(maxlen=_REMEMBERED)

    @torch.no_grad()
    def compute(self, job: Job, packet: Packet, to: str = "cpu") -> Packet | Failure:
        """Compute one item and put it on device `to`; what a stage raises is its result."""
        try:
            with computing(job):
                found = self._computes(unpack(packet, self.stage.device))
            self._returned.append(job.number)
            packed = pack(found, to)
            if packed.data.is_cuda:  # it is read from another stream
                torch.cuda.current_stream(packed.data.device).synchronize()
            return packed
        except Exception as error:
            return Failure.of(self.stage.name, error)

    @torch.no_grad()
    def forget(self, shown: int) -> Failure | None:
        """Tell the stage how many results behind number `shown` it has returned, if it asks."""
        unseen = sum(number > shown for number in self._returned)
        told = getattr(self._computes, "forget", None)
        failed = None
        try:
            if unseen and told is not None:
                told(unseen)
        except Exception as error:
            failed = Failure.of(self.stage.name, error)
        self._returned.clear()  # not where Ctrl-C came: it is told again
        return failed

    def close(self) -> None:
        """Close the stage, if it can be closed."""
        close = getattr(self._computes, "close", None)
        if close is not None:
            close()
