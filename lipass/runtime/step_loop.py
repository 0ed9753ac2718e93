"""Hold a denoising loop that is inside of a graph while it runs: its steps behind guards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lipass import session

Compiled = Callable[..., Any]


class StepLoop:
    """Hold what the guards of one loop share while it runs; separate for each thread."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._local = threading.local()

    def begin(self) -> None:
        """Ask the session which steps of the chunk that is open are reused."""
        chunk = session.current_chunk()
        self._local.reused = () if chunk is None else chunk.step_plan(self.steps).reused
        self._local.chunk = chunk

    def run(self, index: int, compiled: Compiled, args: tuple[Any, ...]) -> Any:
        """Compute a step, or return the outputs of the last computed one."""
        if index == 0:
            self.begin()
        elif index in self._local.reused:
            self._local.chunk.lookups += 1
            return self._local.outputs
        self._local.outputs = outputs = compiled(*args)
        if index == self.steps - 1:
            self._local.outputs = None
        return outputs
