"""Name the passes and the pipelines, so that importing this package imports no pass.

A pipeline is text: the order of the passes is the order in the text, and nothing else. The options
of a pass follow its name in braces, `sparse-attention{tile=4x4x4 budget_decode=0.3}`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING

if __name__ != "lipass.passes":
    raise ImportError(
        f"this package must be imported as lipass.passes, got {__name__!r}; install the project "
        "(pip install -e .) and use `import lipass.passes`"
    )

if TYPE_CHECKING:
    from lipass.passes.core import Pass


def _load(module: str, name: str) -> Callable[[], type[Pass]]:
    def thunk() -> type[Pass]:
        loaded: type[Pass] = getattr(importlib.import_module(f"lipass.passes.{module}"), name)
        return loaded

    return thunk


PASSES: dict[str, Callable[[], type[Pass]]] = {
    "avoid-faults": _load("exact.avoid_faults", "AvoidFaults"),
    "canonicalize": _load("facts.canonicalize", "Canonicalize"),
    "carry-floats": _load("exact.carry_floats", "CarryFloats"),
    "collapse-keys": _load("exact.collapse_keys", "CollapseKeys"),
    "find-attention": _load("facts.find_attention", "FindAttention"),
    "find-poses": _load("facts.find_poses", "FindPoses"),
    "find-steps": _load("facts.find_steps", "FindSteps"),
    "hoist-calls": _load("exact.hoist_calls", "HoistCalls"),
    "hoist-rows": _load("exact.hoist_rows", "HoistRows"),
    "hoist-steps": _load("exact.hoist_steps", "HoistSteps"),
    "merge-history": _load("approx.merge_history", "MergeHistory"),
    "nearest-blocks": _load("approx.nearest_blocks", "NearestBlocks"),
    "pool-history": _load("approx.pool_history", "PoolHistory"),
    "prune-context": _load("approx.prune_context", "PruneContext"),
    "sparse-attention": _load("approx.sparse_attention", "SparseAttention"),
    "tile-order": _load("exact.tile_order", "TileOrder"),
    "attend-pieces": _load("exact.attend_pieces", "AttendPieces"),
    "guard-steps": _load("approx.guard_steps", "GuardSteps"),
    "steer-prompt": _load("approx.steer_prompt", "SteerPrompt"),
    "share-blocks": _load("exact.share_blocks", "ShareBlocks"),
}
"""Pass name to a thunk that imports and returns its class."""

GROUP = "lipass.passes"
"""Entry-point group in which other packages register passes, `pass-name = "module:Class"`."""


@functools.cache
def registered() -> dict[str, Callable[[], type[Pass]]]:
    """Return the passes that other packages register; they run where a pipeline names them.

    Raises:
        ValueError: for a name that a pass of this package has.
    """
    points = importlib.metadata.entry_points(group=GROUP)
    for point in points:
        if point.name in PASSES:
            raise ValueError(
                f"a pass must have a name of its own, got {point.name!r} registered by "
                f"{point.value}; rename it there"
            )
    return {point.name: point.load for point in points}


FACTS = "canonicalize,find-attention,find-poses,find-steps"
"""Passes that find out what a graph holds, without changing what it computes."""

_FIRST = f"{FACTS},collapse-keys,hoist-rows,hoist-steps"
_LAST = "carry-floats,avoid-faults,hoist-calls,share-blocks"
_SPARSE = "sparse-attention,nearest-blocks,pool-history,tile-order,attend-pieces"
_ALL = (
    f"{_FIRST},merge-history,prune-context,sparse-attention,nearest-blocks,pool-history,"
    f"steer-prompt,tile-order,attend-pieces,guard-steps,{_LAST}"
)

PIPELINES: dict[str, str] = {
    "off": "",
    "exact": f"{_FIRST},attend-pieces,{_LAST}",
    "context": f"{_FIRST},prune-context,attend-pieces,{_LAST}",
    "sparse": f"{_FIRST},{_SPARSE},{_LAST}",
    "cache": f"{_FIRST},attend-pieces,guard-steps,{_LAST}",
    "all": _ALL,
    "reference": _ALL,
    "reference-matrix-game": _ALL,
}
"""Preset name to pipeline text."""
