"""Expose the kernels lazily, so that importing them loads neither Triton nor any layer above."""

from __future__ import annotations

import importlib
from typing import Any

_BARE = __name__ != "lipass.kernels"
if _BARE:
    # transformers imports whatever has this name to ask for its version, so the import must not
    # fail; nothing can be had from it.
    __path__ = []

_HOME = {
    "BlockGrid": "plan",
    "BlockPlan": "plan",
    "KvLayout": "plan",
    "Segment": "plan",
    "block_sparse_attention": "block_sparse.api",
    "merge_partials": "block_sparse.api",
    "plan_attention": "planning",
    "pool_blocks": "pool.api",
    "prepare": "block_sparse.native",
    "select_blocks": "select.api",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if _BARE:
        raise AttributeError(
            f"this package must be imported as lipass.kernels, got {__name__!r}; install the "
            "project (pip install -e .) and use `import lipass.kernels`"
        )
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
