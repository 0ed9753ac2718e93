"""Tell graphs that a session has chosen what they may read, so that they do not choose again."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from lipass.kernels import registry


def chosen_by_caller() -> AbstractContextManager[None]:
    """Score every view 1 in graphs called inside.

    The session has scored them once for the chunk; a graph asks again in prefill and at each step.
    """
    return registry.answer("view_overlap", _all_seen)


def _all_seen(query_w2c: Tensor, memory_w2c: Tensor) -> Tensor:
    """Give scores `[B, M]` of 1 for memory cameras `[B, M, 4, 4]`."""
    return query_w2c.new_ones(memory_w2c.shape[:-2])
