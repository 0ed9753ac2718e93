"""Hold one call of `lipass::sparse_attention` with its grids resolved, and check that it fits."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from lipass.kernels.block_sparse.api import unfit_bias, unfit_heads
from lipass.kernels.given import GivenBlocks, unfit_blocks
from lipass.kernels.latent_mask import unfit_mask
from lipass.kernels.nearest.plan import Buckets, in_rows, unfit_buckets
from lipass.kernels.plan import CALL_ROLES, BlockGrid, KvLayout, Triple
from lipass.kernels.planning import PLANNERS, check_means

_PLANNERS = (*PLANNERS, "buckets")


class Call(NamedTuple):
    """One call; what its fields mean is said at the operator, in `lipass.kernels.ops`."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    q_grid: BlockGrid
    layout: KvLayout
    budget: float
    scale: float
    sink_latents: int
    role: str
    keep_frames: Tensor | None
    site: str
    history_means: Tensor | None
    key_bias: Tensor | None
    """`[B or 1, H or 1, Lk]`."""
    planner: str
    given: GivenBlocks | None
    latent_mask: Tensor | None
    buckets: Buckets | None = None
    ramp: Tensor | None = None
    """`[1, 1, Tq, Lk]`, in place of `key_bias`: a row for each latent of the queries."""

    @property
    def candidate(self) -> int | None:
        """Segment whose blocks are chosen."""
        return self.layout.candidate_segment(self.role)


@functools.lru_cache(maxsize=512)
def resolve_layout(
    q_grid: tuple[int, ...],
    kv_grids: tuple[int, ...],
    roles: str,
    tile: tuple[int, ...],
    tile_order: str = "",
) -> tuple[KvLayout, BlockGrid]:
    """Build the layout of keys and the grid of queries that arguments of the operator spell."""
    in_order = tuple(filter(None, tile_order.split(",")))
    if unknown := set(in_order) - {"history", "current"}:
        raise ValueError(
            f"tile_order names segments of latents, history or current, got {sorted(unknown)}; "
            "leave text out"
        )
    names = tuple(name.strip() for name in roles.split(","))
    if len(kv_grids) != 3 * len(names):
        raise ValueError(
            f"kv_grids must hold 3 numbers per role, got {len(kv_grids)} for roles {roles!r}; "
            "write text of L tokens as 1, 1, L"
        )
    triples = tuple(triple(kv_grids[n : n + 3]) for n in range(0, len(kv_grids), 3))
    if len(tile) not in (3, 6):
        raise ValueError(
            f"tile must be 3 sizes, or 6 with a query tile, got {tile}; try (4, 4, 4)"
        )
    layout = KvLayout.build(names, triples, triple(tile[:3]), in_order)
    if in_order and triple(tile[:3]) != triple(tile[-3:]):
        raise ValueError(
            f"tile_order needs one tile for queries and keys, got {tile}; leave the query tile out"
        )
    return layout, BlockGrid(triple(q_grid), triple(tile[-3:]), "current" in in_order)


def triple(sizes: tuple[int, ...]) -> Triple:
    """Check that there are three sizes."""
    t, y, x = sizes
    return (t, y, x)


def check(call: Call) -> None:
    """Raise a `ValueError` for the first rule that a call breaks."""
    if why := _unfit_tokens(call) or _unfit_options(call) or _unfit_frames(call):
        raise ValueError(why)
    if call.history_means is not None:
        layout = call.layout
        if call.buckets is not None:
            layout, _ = in_rows(layout, call.q_grid)
        check_means(call.history_means, call.q, layout, call.candidate)
    why = _unfit_ramp(call) if call.ramp is not None else None
    if why is None and call.given is not None:
        why = unfit_blocks(call.given, call.q, call.layout, call.q_grid)
    if why is None and call.key_bias is not None:
        why = unfit_bias(call.key_bias, call.q, call.layout.tokens)
    if why is None and call.latent_mask is not None:
        why = _unfit_mask(call, call.latent_mask)
    if why is None and call.buckets is not None:
        why = unfit_buckets(call.buckets, call.q, call.layout, call.role)
    if why is not None:
        raise ValueError(why)


def _unfit_ramp(call: Call) -> str | None:
    assert call.ramp is not None
    expected = (1, 1, call.q_grid.grid[0], call.layout.tokens)
    in_order = call.q_grid.in_order or call.layout.laid is not call.layout
    if call.ramp.shape == expected and call.latent_mask is None and not in_order:
        return None
    if in_order:
        return (
            "key_bias for each latent needs tokens latent by latent, got tile order; leave it out"
        )
    beside = "" if call.latent_mask is None else " with a latent_mask"
    return (
        f"key_bias for each latent must be {list(expected)} without a latent_mask, got "
        f"{list(call.ramp.shape)}{beside}; give one row [1, 1, Lk] for all"
    )


def _unfit_mask(call: Call, mask: Tensor) -> str | None:
    if call.keep_frames is not None or call.given is not None or call.buckets is not None:
        other = "history_order" if call.buckets is not None else "blocks"
        other = other if call.keep_frames is None else "keep_frames"
        return (
            f"latent_mask must come alone, got it with {other}; hide the latents that are left "
            "out in the mask"
        )
    return unfit_mask(mask, call.q.shape[0], call.q_grid, call.layout)


def _unfit_tokens(call: Call) -> str | None:
    if call.q.dim() != 4:
        return f"q must be [B, H, Lq, D], got {list(call.q.shape)}; reshape it"
    tokens = call.layout.segment_tokens
    for name, parts in (("k", call.k), ("v", call.v)):
        if why := unfit_heads(name, parts, call.q):
            return why
        if [part.size(2) for part in parts] != tokens:
            return (
                f"{name} must hold {tokens} tokens by segment as kv_grids say, got "
                f"{[part.size(2) for part in parts]}; pass one tensor per role, in order"
            )
    if call.q.size(2) != call.q_grid.tokens:
        return (
            f"q must hold {call.q_grid.tokens} tokens as q_grid {call.q_grid.grid} says, got "
            f"{call.q.shape[2]}; pass the grid of these queries"
        )
    return None


def _unfit_options(call: Call) -> str | None:
    if not 0.0 < call.budget <= 1.0:
        return f"budget must be in (0, 1], got {call.budget}; 1.0 is dense attention"
    if call.role not in CALL_ROLES:
        return (
            f"role must be one of {', '.join(CALL_ROLES)}, got {call.role!r}; leave other "
            "attention dense"
        )
    if call.planner not in _PLANNERS:
        return f"planner must be one of {', '.join(_PLANNERS)}, got {call.planner!r}; use 'mean'"
    ordered = [part.role for part in call.layout.segments if part.grid.in_order]
    if call.planner == "buckets" and "history" in ordered:
        return "planner 'buckets' sorts a history, got one in tile order; use planner 'mean'"
    if (call.planner == "given") != (call.given is not None):
        got = "blocks" if call.given is not None else "none"
        return (
            f"blocks must come with planner 'given' and with no other, got {got} with planner "
            f"{call.planner!r}; pass both or neither"
        )
    if (call.planner == "buckets") != (call.buckets is not None):
        got = "one" if call.buckets is not None else "none"
        return (
            "history_order and history_basis must come with planner 'buckets' and with no other, "
            f"got {got} with planner {call.planner!r}; pass what lipass::key_order and "
            "lipass::key_basis return, or none of the three"
        )
    return None


def _unfit_frames(call: Call) -> str | None:
    if call.history_means is not None and call.role != "decode":
        return (
            f"history_means must come with role 'decode', got {call.role!r}; leave them out there"
        )
    keep = call.keep_frames
    if keep is None:
        return None
    if call.given is not None:
        return (
            "keep_frames must come with a planner that chooses, got it with planner 'given'; "
            "leave the blocks of dropped frames out of the plan"
        )
    number = call.candidate
    frames = 0 if number is None else call.layout.segments[number].grid.grid[0]
    if keep.shape != (call.q.shape[0], frames):
        return (
            f"keep_frames must be [B, T] = [{call.q.shape[0]}, {frames}], got "
            f"{list(keep.shape)}; it covers the history in decode, otherwise the current"
        )
    return None
