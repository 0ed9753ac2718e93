"""Define the running merge of a history: one batch item, one head, one latent at a time.

Keys that are equal weigh, for every query, as much as one of them with `log m` added to its score
and the mean of their values. So keys of the same content in several latents may become one.

Which ones do is decided by what queries see of them. A score moves by `q (k - k') scale` if `k'`
stands for `k`; its mean square over queries is `(k - k')^T metric (k - k')`, whatever positions or
cameras keys carry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Group:
    """Keys that count as one.

    Attributes:
        key: the newest of them `[D]`.
        value: mean of their values `[D]`, fp32.
        count: how many they are.
        farthest: no member's key was farther from `key` than this.
        latest: latent in which one joined last, counted from 0.
        is_sink: stays for ever, and nothing joins it.
    """

    key: Tensor
    value: Tensor
    count: int
    farthest: float
    latest: int
    is_sink: bool


def combine(older: Group, newer: Group) -> Group:
    """Make two groups one: the newer key, the mean of all values, what both count."""
    count = older.count + newer.count
    moved = float((newer.key.float() - older.key.float()).norm())
    return Group(
        newer.key,
        (older.count * older.value + newer.count * newer.value) / count,
        count,
        max(older.farthest + moved, newer.farthest),
        newer.latest,
        older.is_sink,
    )


def similarity(one: Tensor, other: Tensor, metric: Tensor) -> float:
    """Say how alike two keys `[D]` are, 0..1: what weights change by if one stands for the other.

    It is `exp(-s)`, where `s` is the root mean square of what scores change by.
    """
    apart = one.float() - other.float()
    return math.exp(-math.sqrt(max(float(apart @ metric @ apart), 0.0)))


def merge_latent(
    groups: list[Group],
    keys: Tensor,
    values: Tensor,
    *,
    threshold: float,
    capacity: int | None,
    latent: int,
    is_sink: bool,
    metric: Tensor,
) -> None:
    """Add the tokens of one latent to the groups, in place.

    A token joins the group whose key is nearest to its own, if it is also the nearest to that key
    among the tokens of its latent, and the two are at least `threshold` alike; at 1 they are
    equal. All others become groups of their own; beyond `capacity` each takes the place of the
    group that was joined least recently, the one in front of several.

    Args:
        groups: what has been merged so far; their order is kept.
        keys: of the latent `[N, D]`.
        values: like `keys`.
        threshold: least similarity, 0..1.
        capacity: most groups that are kept; None is any number.
        latent: number of the latent.
        is_sink: whether its tokens stay for ever as they are.
        metric: mean of `q q^T scale^2` over queries `[D, D]`.
    """
    open_groups = [n for n, group in enumerate(groups) if not group.is_sink]
    joins: dict[int, int] = {}
    if open_groups and not is_sink:
        stored = torch.stack([groups[n].key for n in open_groups]).float()
        apart = keys.float()[:, None] - stored[None]
        apart = torch.einsum("nmd,de,nme->nm", apart, metric, apart)
        of_token, of_group = apart.argmin(1), apart.argmin(0)
        for token, place in enumerate(of_token.tolist()):
            group = open_groups[place]
            mutual = int(of_group[place]) == token
            same = torch.equal(keys[token], groups[group].key)
            alike = similarity(keys[token], groups[group].key, metric) >= threshold
            if mutual and (same or (alike and threshold < 1)):
                joins[token] = group
    made_of = [
        Group(key, value.float(), 1, 0.0, latent, is_sink)
        for key, value in zip(keys, values, strict=True)
    ]
    for token, n in joins.items():
        groups[n] = combine(groups[n], made_of[token])
    for token, made in enumerate(made_of):
        if token in joins:
            continue
        if capacity is None or len(groups) < capacity:
            groups.append(made)
            continue
        oldest = min(
            (n for n, group in enumerate(groups) if not group.is_sink),
            key=lambda n: groups[n].latest,
        )
        groups[oldest] = made


def attend_groups(queries: Tensor, groups: list[Group], scale: float) -> tuple[Tensor, Tensor]:
    """Attend from `[Lq, D]` to groups: output `[Lq, D]` and log-sum-exp `[Lq]`, fp32."""
    keys = torch.stack([group.key for group in groups]).float()
    values = torch.stack([group.value for group in groups])
    logs = [math.log(group.count) for group in groups]
    bias = torch.tensor(logs, dtype=torch.float32)
    score = scale * (queries.float() @ keys.mT) + bias
    return score.softmax(-1) @ values, score.logsumexp(-1)
