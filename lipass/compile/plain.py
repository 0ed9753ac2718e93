"""Tell a session that a graph compiled with preset `off` does nothing of what it asks for."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx

from lipass.config import Config
from lipass.passes.graph.frame import is_recompile
from lipass.receipt import current_report
from lipass.runtime.agreement import differences, disagreement, tell
from lipass.runtime.scope import current_chunk
from lipass.session import Session

Compiled = Callable[..., Any]


@contextlib.contextmanager
def counted(config: Config) -> Iterator[None]:
    """Record that a graph is compiled inside, without any pass."""
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    current_report().add_graph(seconds, recompile=is_recompile(), preset=config.preset)


def telling(compiled: Compiled, gm: torch.fx.GraphModule, config: Config) -> Compiled:
    """Return the compiled graph so that its calls in a session with other options are told of.

    A graph without attention is returned as it is: nobody expects a part of a codec to be sparse.

    Args:
        compiled: what the inner compiler made.
        gm: the graph.
        config: what it was compiled with.
    """
    if not any("attention" in str(node.target) for node in gm.graph.nodes):
        return compiled
    met: weakref.WeakSet[Session] = weakref.WeakSet()

    def run(*args: Any) -> Any:
        chunk = current_chunk()
        if chunk is not None and chunk.session not in met:
            session = chunk.session
            if lines := differences(config, set(), session.config):
                strict = config.strict or session.config.strict
                presets = config.preset, session.config.preset
                said = disagreement(lines, *presets, replays=session.recorded is not None)
                tell(said, strict=strict)
            met.add(session)
        return compiled(*args)

    return run
