"""Attend as compiled graphs do: in the scopes of the open session, counted in the receipt."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The import registers the operator.
import lipass.kernels.ops  # noqa: F401
from lipass import session
from lipass.eager.keys import Grid, Keys, check, grid_of, heads_of, joined_bias, own_grid
from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.policy.blocks import early_step, short_context
from lipass.receipt import SiteRecord, current_report
from lipass.runtime.coarse_steps import WHY_DENSE

# Where no session sets one, and where a pass will.
_TILE = (4, 4, 4)


class _Scope(NamedTuple):
    """What is open where a call is made says of it."""

    budget: float
    tile: tuple[int, ...]
    sink_latents: int
    dense_reason: str
    """Why every call of the site stays dense, or nothing."""
    chunk: session.Chunk | None
    planner: str = "mean"


def attend(
    q: Tensor,
    segments: Sequence[tuple[Any, ...]],
    *,
    site: str,
    scale: float | None = None,
    q_grid: Sequence[int] | None = None,
    layer: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from `q` to text, history and current keys, sparse where the open session says so.

    Tile, budgets, sink and ranking are those of the session's config; chunks and first steps that
    stay dense stay dense here; where a session has chosen some latents and the history holds all
    of `held`, in that order, the others are not read. Outside of sessions, at budget 1.0 and with
    the section `sparse` off this is dense attention. In a model that is compiled the call becomes
    a site of the graph, whose passes set the same.

    Args:
        q: queries `[B, H, Lq, D]`.
        segments: `(role, keys, values, grid, bias)` for each run of keys, each role at most once:
            `"text"`, `"history"` or `"current"`, the tokens of `q` itself. Keys and values are
            `[B, H, L, D]`; fewer heads are shared by groups of those of q. `grid` is
            `(T, Y, X)`, or `(Y, X)` of one latent, row-major; text needs none. `bias`, which may
            be left out, is added to the scores of each key: `[L]` or `[B or 1, H or 1, L]`.
        site: name in the receipt; calls of prefill and of decode are best named apart.
        scale: softmax scale; `D ** -0.5` by default.
        q_grid: `(T, Y, X)` or `(Y, X)` of the queries where no segment is current.
        layer: number of the call in one call of the model, for `sparse.dense_layers`.
        return_lse: also return the log-sum-exp of the scores, with which
            `lipass.kernels.merge_partials` joins attention over parts of the keys.

    Returns:
        Output `[B, H, Lq, D]` in `q.dtype`, in memory `[B, Lq, H, D]`; with `return_lse` also
        `[B, H, Lq]` fp32, base e.

    Raises:
        ValueError: if tensors, grids or names do not fit together.
        LipassError: if a gradient would be recorded; or, with `strict`, if the history holds
            neither the latents that the session chose nor all of them.
    """
    parts = [Keys(*segment) for segment in segments]
    check(q, parts, site)
    grids = {part.role: grid_of(part) for part in parts}
    own = own_grid(q, q_grid, grids)
    role = "decode" if "history" in grids else "prefill"
    operators = torch.ops.lipass
    call = functools.partial(
        (operators.sparse_attention_lse if return_lse else operators.sparse_attention).default,
        q,
        [heads_of(q, part.keys) for part in parts],
        [heads_of(q, part.values) for part in parts],
        list(own),
        [size for grid in grids.values() for size in grid],
        ",".join(grids),
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        role=role,
        site=site,
        key_bias=joined_bias(q, parts),
    )
    if torch.compiler.is_compiling():
        return _out(call(tile=list(_TILE), budget=1.0, sink_latents=0, keep_frames=None))
    scope = _scope(role, layer)
    keep, told = _chosen_frames(scope.chunk, grids.get("history"), q, site)
    _record(site, role, own, tuple(grids), scope, told)
    reason = scope.dense_reason or _of_chunk(scope.chunk, own, role)
    with registry.force("dense", reason) if reason else contextlib.nullcontext():
        return _out(
            call(
                tile=list(scope.tile),
                budget=scope.budget,
                sink_latents=scope.sink_latents,
                keep_frames=keep,
                planner=scope.planner,
            )
        )


def _out(result: Any) -> Tensor | tuple[Tensor, Tensor]:
    found: Tensor | tuple[Tensor, Tensor] = result
    return found


def _of_chunk(chunk: session.Chunk | None, own: Grid, role: str) -> str | None:
    """Say why a call of a chunk stays dense, or None."""
    if chunk is None:
        return None
    if chunk.coarse.running:
        return WHY_DENSE
    options, latent_tokens = chunk.session.config.sparse, own[1] * own[2]
    short = short_context(options, len(chunk.context), latent_tokens)
    if (reason := chunk.plan.dense_reason or short) or options is None:
        return reason
    asks = role == "decode" and options.dense_steps > 0
    step = session.current_step() if asks else None
    return None if step is None else early_step(options, step.index)


def _scope(role: str, layer: int | None) -> _Scope:
    """Read what is open where the call is made."""
    open_session, chunk = session.current(), session.current_chunk()
    if open_session is None:
        return _Scope(1.0, _TILE, 0, "no session is open", None)
    config = open_session.config
    options = config.sparse
    if options is None:
        return _Scope(1.0, _TILE, 0, f"sparse is off in preset {config.preset!r}", chunk)
    if options.dense_layers and layer is None:
        raise ValueError(
            f"sparse.dense_layers {options.dense_layers} needs the number of each layer, got "
            "None; pass layer=, counted from 0 in one call of the model"
        )
    reason = f"layer {layer} is in dense_layers" if layer in options.dense_layers else ""
    budget = options.budget_decode if role == "decode" else options.budget_prefill
    tile = options.tile + (options.query_tile or ())
    planner = "cosine" if options.ranking == "cosine" else "mean"
    return _Scope(budget, tile, options.sink_latents, reason, chunk, planner)


def _chosen_frames(
    chunk: session.Chunk | None, history: Grid | None, q: Tensor, site: str
) -> tuple[Tensor | None, str]:
    """Return which latents of a history the session chose `[B, T]`, where it holds all, and why.

    Raises:
        LipassError: with `strict`, if the history is neither what was chosen nor everything.
    """
    if chunk is None or history is None or not chunk.chooses:
        return None, ""
    latents, chosen = history[0], chunk.context
    if latents == len(chosen):
        return None, ""
    places = None
    if latents == len(chunk.held):
        places = tuple(n for n, latent in enumerate(chunk.held) if latent in set(chosen))
    elif latents == chunk.plan.history_latents:
        places = tuple(chosen)
    if places is not None:
        keep = _mask(places, latents, q.device)
        told = f"; {latents - len(chosen)} of {latents} history latents are not in the context"
        return keep.expand(q.shape[0], -1), told
    told = (
        f"history must hold the {len(chosen)} latents of chunk.context or all "
        f"{len(chunk.held)} that are held, got {latents}"
    )
    if chunk.session.config.strict:
        raise LipassError(f"strict: at {site}, {told}; pass the keys of chunk.context")
    return None, f"; none is left out: {told}"


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _mask(chosen: tuple[int, ...], latents: int, device: torch.device) -> Tensor:
    """Say which latents are chosen, `[1, latents]`; the same for all layers of a chunk."""
    return torch.tensor([[n in chosen for n in range(latents)]], device=device)


def _record(
    site: str, role: str, grid: Grid, roles: tuple[str, ...], scope: _Scope, told: str
) -> None:
    """Enter the site into the receipt, unless it is there as it is now."""
    report = current_report()
    action, reason = "rewritten", f"{role}, budget {scope.budget:g}"
    if scope.dense_reason:
        action, reason = "kept", scope.dense_reason
    reason += told
    before = report.sites.get(site)
    if before is not None and (before.role, before.grid, before.segments, before.reason) == (
        role, grid, roles, reason,
    ):  # fmt: skip
        return
    # Frames of this function and of `attend` lie between here and the caller.
    caller = sys._getframe(2)
    source = f"{caller.f_code.co_filename.rpartition('/')[2]}:{caller.f_lineno}"
    report.add_site(SiteRecord(site, source, role, grid, roles, action, reason))
