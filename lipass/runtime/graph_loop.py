"""Hold a denoising loop that is inside of a graph while it runs: its steps behind guards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lipass.runtime.chunk import Chunk
from lipass.runtime.results import copy_of
from lipass.runtime.scope import current_chunk, current_step

Compiled = Callable[..., Any]


@dataclass
class _Run:
    """One run of the graph: the chunk it belongs to, what it reuses, the latest output."""

    chunk: Chunk | None
    reused: tuple[int, ...]
    outputs: Any = None


class GraphLoop:
    """Guard the steps of one loop; each run of the graph has a state of its own."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._local = threading.local()

    def running(self, graph: Compiled) -> Compiled:
        """Return a function that runs the graph and asks the chunk once which steps it reuses.

        Where the call is itself a step of `Chunk.steps`, the loop in Python decides: all of this
        one computes, such as the two slopes of Heun's rule.
        """

        def run(*args: Any) -> Any:
            self._local.run = self._begin()
            try:
                return graph(*args)
            finally:
                self._local.run = None

        return run

    def _begin(self) -> _Run:
        chunk = current_chunk()
        if chunk is None or current_step() is not None:
            return _Run(chunk, ())
        return _Run(chunk, chunk.step_plan(self.steps).reused)

    def step(self, index: int, compiled: Compiled, args: tuple[Any, ...]) -> Any:
        """Compute a step, or return a copy of what the last computed one returned."""
        run: _Run = self._local.run
        if index in run.reused:
            assert run.chunk is not None
            run.chunk.hit(index)
            return copy_of(run.outputs)
        outputs = compiled(*args)
        # The sampler may write to what it gets, so a copy stays here.
        run.outputs = copy_of(outputs) if index + 1 in run.reused else None
        return outputs
