"""Self-Forcing, Causal-Forcing and minWM: a rolled cache written in place, blocks re-noised."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.cache_ends import CacheEnds, holds_indices, tie
from lipass.adapters.families import Family
from lipass.adapters.size_tensors import keep_sizes


def _adopt(model: nn.Module, adoption: Adoption) -> None:
    keep_sizes(model, adoption)
    ends = CacheEnds(adoption)
    adoption.rebind(
        model, "forward", _with_ends(model, ends), "ends of its cache are ints, not tensors"
    )


def _with_ends(model: Any, ends: CacheEnds) -> Callable[..., Any]:
    own = type(model).forward
    keep = torch.compiler.disable(ends.keep, reason="a cache is seen for the first time")

    def forward(self: Any, *args: Any, kv_cache: Any = None, **given: Any) -> Any:
        if kv_cache is None:
            return own(self, *args, **given)
        if holds_indices(kv_cache):
            keep(kv_cache)
        tie(kv_cache)
        return own(self, *args, kv_cache=kv_cache, **given)

    return MethodType(forward, model)


FAMILY = Family(
    name="self_forcing",
    classes=("causal_model.CausalWanModel",),
    adopt=_adopt,
)
