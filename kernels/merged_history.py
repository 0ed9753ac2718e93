"""Register `lipass::attend_merged`: attention that reads a history whose keys have been merged.

The operator is opaque: how many keys are left after merging is in no shape of the graph, so that
nothing is compiled again while a history grows. Who keeps what was merged from call to call, an
open session, answers `merge_history`; without one each call merges what it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels import registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.dense import attend_biased
from lipass.kernels.merge.running import MergedKeys, MergeRule, RunningMerge, query_metric
from lipass.kernels.pieces import attend_to_all, unfit_pieces
from lipass.kernels.token_major import empty_token_major

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define(
    "attend_merged(Tensor q, Tensor[] k, Tensor[] v, int history, int latent_tokens, float scale, "
    "float threshold, int? kv_tokens, int sink_latents, str site) -> Tensor"
)


def merge_given(k: Tensor, v: Tensor, metric: Tensor, rule: MergeRule) -> MergedKeys:
    """Merge a history `[B, H, L, D]` from its first latent on, see `RunningMerge`.

    Raises:
        ValueError: if a key is NaN or infinite, as far as can be told without waiting for it.
    """
    check_finite(k)
    running = RunningMerge(k, rule)
    running.add(k, v, metric)
    return running.merged(v.dtype)


def check_finite(k: Tensor) -> None:
    """Refuse keys that are no numbers; on a device nobody waits to see."""
    if k.device.type == "cpu" and not bool(k.isfinite().all()):
        bad = int((~k.isfinite()).any(3).any(1).any(0).sum())
        raise ValueError(
            f"keys of a history must be finite to be merged, got {bad} of {k.shape[2]} tokens "
            "with NaN or infinite keys; find what makes them in the call that wrote them to the "
            "cache, or set 'merge': False"
        )


def check_rule(rule: MergeRule) -> None:
    """Raise a `ValueError` for what nothing can be merged by."""
    if not 0.0 <= rule.threshold <= 1.0:
        raise ValueError(
            f"threshold must be in [0, 1], got {rule.threshold}; 1.0 merges equal keys only"
        )
    least = rule.sink_tokens + rule.chunk_tokens
    if rule.capacity is not None and rule.capacity < least:
        raise ValueError(
            f"kv_tokens must hold the sink and one chunk, {rule.sink_tokens} + "
            f"{rule.chunk_tokens} tokens, got {rule.capacity}; use at least {least}, or None for "
            "no limit"
        )


def _attend_merged(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    history: int,
    latent_tokens: int,
    scale: float,
    threshold: float,
    kv_tokens: int | None,
    sink_latents: int,
    site: str,
) -> Tensor:
    """Attend to all pieces, to the merged keys in place of those of the history.

    Args:
        q: queries `[B, H, Lq, D]`, of one chunk.
        k: keys, one tensor a piece, `[B, H / groups, L, D]`.
        v: values like `k`.
        history: which piece is the history.
        latent_tokens: tokens of one latent of it.
        scale: softmax scale.
        threshold: least similarity of keys that merge, see `MergeRule`.
        kv_tokens: most tokens of the history that are kept a head, or None.
        sink_latents: leading latents that stay as they are.
        site: name for the counts; several, comma separated, where layers share this call.

    Returns:
        Output `[B, H, Lq, D]` in `q.dtype`, in memory `[B, Lq, H, D]`.

    Raises:
        ValueError: for a rule that nothing can be merged by, keys that are no numbers, or pieces
            that do not go with the queries.
    """
    site = registry.site_of_call(site)
    sink = sink_latents * latent_tokens
    rule = MergeRule(threshold, kv_tokens, sink, latent_tokens, q.shape[2])
    check_rule(rule)
    keys, values = k[history], v[history]
    answer = registry.answer_of("merge_history")
    given = sum(piece.shape[2] for piece in k)
    pairs = q.shape[0] * q.shape[1]
    if keys.shape[2] == 0:
        merged = None
    elif answer is None:
        merged = merge_given(keys, values, query_metric(q, scale, keys.shape[1]), rule)
    else:
        merged = answer(q, keys, values, scale, rule, site)
    groups = q.shape[1] // keys.shape[1]
    k, v = list(k), list(v)
    if merged is not None:
        k[history], v[history] = merged.k, merged.v
    if groups > 1:
        k, v = ([one.repeat_interleave(groups, 1) for one in pieces] for pieces in (k, v))
    if why := unfit_pieces(q, k, v):
        raise ValueError(why)
    if merged is None:
        out, provider = attend_to_all(q, k, v, scale)
    else:
        out, _, provider = attend_biased(q, k, v, scale, _bias(merged, k, history), lse=False)
    registry.record_call(
        site,
        role="decode",
        provider=provider,
        visited=pairs * sum(piece.shape[2] for piece in k),
        total=pairs * given,
    )
    if merged is not None:
        longest = q.detach().float().norm(dim=3).max()
        registry.record_score_errors(site, scale * longest * merged.farthest, merged.moved)
    return out


def _bias(merged: MergedKeys, k: list[Tensor], history: int) -> Tensor:
    """Add nothing to the scores of the other pieces; `[B, H, Lk]`."""
    heads = k[history].shape[1]
    groups = heads // merged.bias.shape[1]
    own = merged.bias if groups == 1 else merged.bias.repeat_interleave(groups, 1)
    return torch.cat(
        [
            own if n == history else own.new_zeros(*own.shape[:2], piece.shape[2])
            for n, piece in enumerate(k)
        ],
        2,
    )


_library.impl("attend_merged", in_given_dtypes(_attend_merged), "CompositeExplicitAutograd")


@torch.library.register_fake("lipass::attend_merged", lib=_library)
def _attend_merged_fake(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    return empty_token_major(q)
