"""Check the keys that eager code passes, and spell them as the operator takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.errors import LipassError
from lipass.kernels.plan import ROLES

Grid = tuple[int, int, int]


class Keys(NamedTuple):
    """One run of keys, as the caller wrote it."""

    role: str
    keys: Tensor
    values: Tensor
    grid: Sequence[int] | None = None
    bias: Tensor | None = None


def check(q: Tensor, parts: list[Keys], site: str) -> None:
    """Raise for what the kernels take on trust."""
    if not site or "," in site:
        raise ValueError(f"site must be a name without commas, got {site!r}; name the layer")
    if q.dim() != 4:
        raise ValueError(f"q must be [B, H, L, D], got {list(q.shape)}; split the heads first")
    roles = [part.role for part in parts]
    if not roles or set(roles) - set(ROLES) or len(set(roles)) < len(roles):
        raise ValueError(
            f"segments must have the roles {', '.join(ROLES)}, each at most once, got {roles}; "
            "join keys of one role first"
        )
    for part in parts:
        for name, x in (("keys", part.keys), ("values", part.values)):
            _check_like(q, x, f"{name} of {part.role}")
        if part.keys.shape != part.values.shape:
            raise ValueError(
                f"keys and values of {part.role} must have one shape, got "
                f"{list(part.keys.shape)} and {list(part.values.shape)}; pass those of one call"
            )
    tensors = [q, *(x for part in parts for x in (part.keys, part.values))]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise LipassError(
            "attend records no gradient, got tensors that require one; call it under "
            "torch.no_grad(), or train with scaled_dot_product_attention"
        )


def _check_like(q: Tensor, x: Tensor, name: str) -> None:
    if x.dim() != 4 or (x.shape[0], x.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"{name} must be [B, H, L, D] with B = {q.shape[0]} and D = {q.shape[3]}, got "
            f"{list(x.shape)}; split the heads first"
        )
    if not x.shape[1] or q.shape[1] % x.shape[1]:
        raise ValueError(
            f"heads of {name} must divide the {q.shape[1]} of q, got {x.shape[1]}; repeat them"
        )
    if (x.dtype, x.device) != (q.dtype, q.device):
        raise ValueError(
            f"{name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}; "
            "convert them"
        )


def grid_of(part: Keys) -> Grid:
    """Return `(T, Y, X)` of a segment."""
    tokens = part.keys.shape[2]
    if part.role == "text" and part.grid is None:
        return (1, 1, tokens)
    return _whole_grid(part.grid, tokens, f"grid of {part.role}")


def own_grid(q: Tensor, given: Sequence[int] | None, grids: dict[str, Grid]) -> Grid:
    """Return `(T, Y, X)` of the queries."""
    if given is not None:
        return _whole_grid(given, q.shape[2], "q_grid")
    if "current" not in grids:
        raise ValueError(
            f"q_grid must be given where no segment is current, got segments {', '.join(grids)}; "
            "pass (T, Y, X) of the queries"
        )
    return _whole_grid(grids["current"], q.shape[2], "grid of current, which is that of q,")


def _whole_grid(given: Sequence[int] | None, tokens: int, name: str) -> Grid:
    sizes = tuple(given or ())
    if len(sizes) == 2 and sizes[0] * sizes[1] > 0:
        sizes = (tokens // (sizes[0] * sizes[1]), *sizes)
    if len(sizes) != 3 or sizes[0] * sizes[1] * sizes[2] != tokens:
        raise ValueError(
            f"{name} must be (T, Y, X) or (Y, X) of {tokens} tokens, got {given}; pass "
            "height and width of a latent in tokens"
        )
    return (sizes[0], sizes[1], sizes[2])


def heads_of(q: Tensor, x: Tensor) -> Tensor:
    """Repeat heads that are shared by groups of heads of q."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def joined_bias(q: Tensor, parts: list[Keys]) -> Tensor | None:
    """Join the biases of all segments, `[B or 1, H or 1, Lk]` fp32; None where none has any."""
    shaped = []
    for part in parts:
        bias, tokens = part.bias, part.keys.shape[2]
        if bias is None:
            bias = q.new_zeros(1, 1, tokens, dtype=torch.float32)
        bias = bias[None, None] if bias.dim() == 1 else bias
        if bias.dim() != 3 or bias.shape[2] != tokens:
            raise ValueError(
                f"bias of {part.role} must be [{tokens}] or [B or 1, H or 1, {tokens}], got "
                f"{list(bias.shape)}; write a bias of each head as [1, H, L]"
            )
        if bias.shape[0] not in (1, q.shape[0]) or bias.shape[1] not in (1, q.shape[1]):
            raise ValueError(
                f"bias of {part.role} must be [B or 1, H or 1, {tokens}] with B = {q.shape[0]} "
                f"and H = {q.shape[1]} as q has, got {list(bias.shape)}; write what all share as 1"
            )
        if bias.device != q.device:
            raise ValueError(
                f"bias of {part.role} must be on {q.device} as q is, got {bias.device}; move it"
            )
        shaped.append(bias.float())
    if all(part.bias is None for part in parts):
        return None
    outer = [max(bias.shape[axis] for bias in shaped) for axis in (0, 1)]
    return torch.cat([bias.expand(*outer, -1) for bias in shaped], 2)
