"""Stand-ins for attention that no graph shows: flash_attn, sageattention, xformers, Wan's own.

A stand-in is called like the function whose place it takes, in whichever version of its library:
positions are read from the signature of the original. What plain attention cannot do goes to the
original, behind a graph break that says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch

from lipass.adapters import host_ints
from lipass.adapters.plain_attention import attend, attend_packed

LIBRARIES = ("flash_attn", "flash_attn_interface", "flash_attn_3", "sageattention", "xformers")
"""Packages whose attention runs in kernels of their own."""

_HARMLESS = {
    "deterministic", "num_splits", "pack_gqa", "sm_margin", "version", "fa_version", "op",
    "smooth_k", "smooth_v", "qk_quant_gran", "qk_quant_dtype", "pv_accum_dtype", "q_lens",
    "max_seqlen_q", "max_seqlen_k", "seqused_q",
}  # fmt: skip
"""Arguments that change how something is computed; `q_lens` of Wan must be all of q."""
_ONES = {
    "flash_attn_func": ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size"),
    "flash_attn_varlen_func": (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p",
        "softmax_scale", "causal", "window_size",
    ),
    "flash_attn_with_kvcache": ("q", "k_cache", "v_cache", "k", "v"),
    "flash_attn_qkvpacked_func": ("qkv", "dropout_p", "softmax_scale", "causal", "window_size"),
    "flash_attn_kvpacked_func": ("q", "kv", "dropout_p", "softmax_scale", "causal", "window_size"),
    "sageattn": ("q", "k", "v", "tensor_layout", "is_causal", "sm_scale"),
    "sageattn_varlen": (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "is_causal",
        "sm_scale",
    ),
    "memory_efficient_attention": ("query", "key", "value", "attn_bias", "p", "scale"),
}  # fmt: skip
"""Functions that a stand-in is known for, with their positions where no signature can be read."""
_WAN = {
    "q", "k", "v", "q_lens", "k_lens", "dropout_p", "softmax_scale", "q_scale", "causal",
    "window_size", "deterministic", "dtype", "version", "fa_version",
}  # fmt: skip
_CACHE = {"cache_seqlens"}
"""How many keys of each sample a cache holds, one number or `[B]`."""
_KNOWN = _CACHE | _WAN | {name for names in _ONES.values() for name in names} | _HARMLESS


def stand_in(found: object, bound: str = "") -> Callable[..., Any] | ModuleType | None:
    """Return what may take the place of an object, or None where nothing has to.

    A function for an attention function of a library, or of a model that calls one; for the
    module of a library it is a copy that holds such functions.

    Args:
        found: what a module binds.
        bound: the name it is bound to, where the object itself has none.
    """
    if isinstance(found, ModuleType):
        return _library(found) if _root(found.__name__) in LIBRARIES else None
    if not callable(found) or isinstance(found, type):
        return None
    if is_wan_like(found):
        return _function(found, "flash_attention")
    name = str(getattr(found, "__name__", bound) or bound)
    known = "sageattn" if name.startswith("sageattn_qk") else name
    return _function(found, known) if known in _ONES else None


def _root(name: str) -> str:
    return name.partition(".")[0]


def is_wan_like(found: object) -> bool:
    """Say whether a function of a model has Wan's signature and calls flash attention."""
    if not isinstance(found, FunctionType):
        return False
    names = set(found.__code__.co_names)
    parameters = set(inspect.signature(found).parameters)
    return (
        bool(names & {*_ONES, *LIBRARIES, "flash_attention"})
        and {"q", "k", "v"} <= parameters <= _WAN
    )


def _library(module: ModuleType) -> ModuleType | None:
    """Return a copy of a library's module whose attention functions are stand-ins."""
    copy, changed = ModuleType(module.__name__), False
    vars(copy).update(vars(module))
    for name, found in list(vars(module).items()):
        if isinstance(found, ModuleType) and not found.__name__.startswith(f"{module.__name__}."):
            continue
        if (plain := stand_in(found, name)) is not None:
            setattr(copy, name, plain)
            changed = True
    return copy if changed else None


def _function(original: Any, name: str) -> Callable[..., Any]:
    names, defaults = _signature(original, _ONES.get(name, ()))
    if name == "sageattn":
        defaults.setdefault("tensor_layout", "HND")
    kept: dict[str, Callable[..., Any]] = {
        why: torch.compiler.disable(original, reason=f"{name} stays: {why}") for why in _REASONS
    }

    def plain(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        why = _why_not(given, defaults)
        if why:
            return kept[why](*args, **kwargs)
        return _call(given)

    plain.__name__ = plain.__qualname__ = name
    return plain


def _signature(original: Any, fallback: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    try:
        parameters = inspect.signature(original).parameters.values()
    except (TypeError, ValueError):
        return fallback, {}
    names = tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
    if not names:
        return fallback, {}
    return names, {one.name: one.default for one in parameters if one.default is not one.empty}


_DROPOUT = "it drops weights at random"
_UNKNOWN = "an argument is not of plain attention (softcap, alibi, a descale, a block table)"
_SUMS = "it returns more than its output"
_BIAS = "its mask is an object of the library"
_LENGTHS = "it packs sequences of several lengths, whose mask would not fit on a GPU"
_WRITES = "it writes new keys to the cache that it reads"
_REASONS = (_DROPOUT, _UNKNOWN, _SUMS, _BIAS, _LENGTHS, _WRITES)


def _why_not(given: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Say why plain attention is not what the call asks for, or return nothing."""
    if given.get("dropout_p") or given.get("p"):
        return _DROPOUT
    for name, found in given.items():
        if name.startswith("return_"):
            if found:
                return _SUMS
        elif name not in _KNOWN and _is_other(found, defaults.get(name)):
            return _UNKNOWN
    bias = given.get("attn_bias")
    if bias is not None and not isinstance(bias, torch.Tensor):
        return _BIAS
    if "k_cache" in given:
        return _WRITES if given.get("k") is not None or given.get("v") is not None else ""
    if "cu_seqlens_q" in given and given["q"].is_cuda and _alike(given) is None:
        return _LENGTHS
    return ""


def _is_other(found: object, default: object) -> bool:
    return isinstance(found, torch.Tensor) or (found is not default and found != default)


def _alike(given: dict[str, Any]) -> int | None:
    """Return how many sequences are packed if all must be as long as the longest, or None."""
    longest = (given["max_seqlen_q"], given["max_seqlen_k"])
    if isinstance(longest[0], torch.Tensor) or isinstance(longest[1], torch.Tensor):
        return None
    count: int = given["cu_seqlens_q"].shape[0] - 1
    full = given["q"].shape[0] == count * longest[0] and given["k"].shape[0] == count * longest[1]
    return count if full else None


def _call(given: dict[str, Any]) -> torch.Tensor:
    options: dict[str, Any] = {
        "scale": given.get("softmax_scale", given.get("sm_scale", given.get("scale"))),
        "causal": bool(given.get("causal", given.get("is_causal", False))),
        "window": given.get("window_size") or (-1, -1),
    }
    if "k_cache" in given:
        lengths = given.get("cache_seqlens")
        return attend(given["q"], given["k_cache"], given["v_cache"], k_lens=lengths, **options)
    if "cu_seqlens_q" in given:
        return _packed(given, options)
    q, k, v = _operands(given)
    if given.get("tensor_layout", "NHD") == "HND":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attend(q, k, v, **options).transpose(1, 2)
    bias = given.get("attn_bias")
    if q.dim() == 3:  # xformers takes [B, L, D] too
        bias = bias[:, None] if bias is not None and bias.dim() == 3 else bias
        q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
        return attend(q, k, v, bias=bias, **options)[:, :, 0]
    if "k_lens" in given:
        return _wan(q, k, v, given, options)
    return attend(q, k, v, bias=bias, **options)


def _operands(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if "qkv" in given:
        q, k, v = given["qkv"].unbind(2)
    elif "kv" in given:
        q, (k, v) = given["q"], given["kv"].unbind(2)
    elif "query" in given:
        q, k, v = given["query"], given["key"], given["value"]
    else:
        q, k, v = given["q"], given["k"], given["v"]
    return q, k, v


def _packed(given: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    q, k, v = given["q"], given["k"], given["v"]
    count = _alike(given)
    if count is None:
        return attend_packed(q, k, v, given["cu_seqlens_q"], given["cu_seqlens_k"], **options)
    q, k, v = (one.unflatten(0, (count, -1)) for one in (q, k, v))
    return attend(q, k, v, **options).flatten(0, 1)


def _wan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    given: dict[str, Any],
    options: dict[str, Any],
) -> torch.Tensor:
    """Round to `dtype` where the kernels do, which is on a GPU only."""
    returned, halves = q.dtype, (torch.float16, torch.bfloat16)
    if q.is_cuda:
        half = given.get("dtype", torch.bfloat16)
        q, k, v = (one if one.dtype in halves else one.to(half) for one in (q, k, v))
    q, k = q.to(v.dtype), k.to(v.dtype)
    if given.get("q_scale") is not None:
        q = q * given["q_scale"]
    return attend(q, k, v, k_lens=host_ints.plain(given["k_lens"]), **options).to(returned)
