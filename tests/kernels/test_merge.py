"""Merging a history: the lemma that makes it exact, what corresponds, what leaves."""

import itertools
import math

import pytest
import torch

from lipass.kernels import dense
from lipass.kernels.merge import reference
from lipass.kernels.merge.reference import Group, attend_groups, combine, merge_latent
from lipass.kernels.merge.running import MergeRule, RunningMerge, query_metric

LATENT = 6


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drifting(latents, *, batch=1, heads=2, dim=8, step=0.2, seed=0, dtype=torch.float32):
    """Keys and values `[B, H, L, D]` of latents whose tokens change, and change places."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, heads, LATENT, dim, generator=generator)
    keys = []
    for _ in range(latents):
        key = key + step * torch.randn(key.shape, generator=generator)
        order = torch.randperm(LATENT, generator=generator)
        keys.append(key[:, :, order])
        key[:, :, 0] = torch.randn(batch, heads, dim, generator=generator)  # something new
    k = torch.cat(keys, 2)
    return k.to(dtype), torch.randn(k.shape, generator=generator).to(dtype)


def plain(k):
    """A metric in which scores move by the distance of keys."""
    return torch.eye(k.shape[-1]).expand(*k.shape[:2], -1, -1)


def merged(k, v, threshold=0.5, capacity=None, sink=0, metric=None):
    running = RunningMerge(k, MergeRule(threshold, capacity, sink * LATENT, LATENT, 2 * LATENT))
    running.add(k, v, plain(k) if metric is None else metric)
    return running.merged(v.dtype)


def by_definition(k, v, threshold=0.5, capacity=None, sink=0, metric=None):
    """Groups of one head of one batch item."""
    groups: list[Group] = []
    for n, start in enumerate(range(0, len(k), LATENT)):
        here = slice(start, start + LATENT)
        merge_latent(
            groups, k[here], v[here],
            threshold=threshold, capacity=capacity, latent=n, is_sink=n < sink,
            metric=torch.eye(k.shape[-1]) if metric is None else metric,
        )  # fmt: skip
    return groups


def attend(q, found, scale):
    """Output and log-sum-exp over merged keys."""
    return dense.attend_plainly(q, found.k, found.v, scale, found.bias[:, :, None])


def attend_all(q, k, v, scale):
    return dense.attend_plainly(q, k, v, scale, None)


@pytest.mark.parametrize("latents", [1, 2, 7])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_equal_keys_merge_without_any_error(latents, threshold):
    once, q = drawn(2, 3, LATENT, 8), drawn(2, 3, 10, 8, seed=1)
    k = once.repeat(1, 1, latents, 1)
    v = drawn(*k.shape, seed=2)
    found = merged(k, v, threshold)
    assert found.k.shape[2] == LATENT
    assert torch.allclose(found.bias, torch.tensor(float(latents)).log())
    assert float(found.farthest) == float(found.moved) == 0.0
    for got, expected in zip(attend(q, found, 0.4), attend_all(q, k, v, 0.4), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


def test_at_threshold_1_other_keys_stay_apart():
    k, v = drifting(5, step=1e-3)
    found = merged(k, v, 1.0)
    assert found.k.shape == k.shape
    assert torch.equal(found.bias, torch.zeros_like(found.bias))
    assert torch.equal(found.k, k)
    assert torch.equal(found.v, v)


def test_similarity_is_what_weights_change_by():
    q, (one, other) = drawn(1, 1, 40, 8), drawn(2, 8, seed=1)
    moved = 0.3 * (q[0, 0] @ (one - other))
    expected = math.exp(-float(moved.square().mean().sqrt()))
    metric = query_metric(q, 0.3, 1)[0, 0]
    assert reference.similarity(one, other, metric) == pytest.approx(expected, rel=1e-5)
    assert reference.similarity(one, one, metric) == 1.0


@pytest.mark.parametrize("capacity", [None, 14, 20])
@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("measured", [False, True])
def test_all_heads_at_once_do_what_the_definition_says_of_one(capacity, sink, threshold, measured):
    k, v = drifting(8, batch=2, heads=3)
    metric = query_metric(drawn(2, 3, 30, 8, seed=4), 0.5, 3) if measured else None
    found = merged(k, v, threshold, capacity, sink, metric)
    counts = set()
    for b, h in itertools.product(range(2), range(3)):
        own = None if metric is None else metric[b, h]
        groups = by_definition(k[b, h], v[b, h], threshold, capacity, sink, own)
        n = len(groups)
        counts.add(n)
        assert torch.equal(found.k[b, h, :n], torch.stack([g.key for g in groups]))
        expected = torch.stack([g.value for g in groups])
        assert torch.allclose(found.v[b, h, :n], expected, atol=1e-6)
        counted = torch.tensor([float(g.count) for g in groups])
        assert torch.allclose(found.bias[b, h, :n].exp(), counted)
        assert bool((found.bias[b, h, n:] == -math.inf).all())
    assert found.k.shape[2] == max(counts)
    if threshold == 0.6 and capacity is None and not measured:
        assert len(counts) > 1  # heads differ, and the shorter ones are padded


def test_heads_that_share_keys_look_together():
    q, one, other = drawn(1, 4, 30, 8), drawn(8, seed=1), drawn(8, seed=2)
    moved = 0.5 * (q @ (one - other))
    expected = moved.unflatten(1, (2, 2)).square().mean((2, 3))[0]
    found = [(one - other) @ metric @ (one - other) for metric in query_metric(q, 0.5, 2)[0]]
    assert torch.allclose(torch.stack(found), expected, rtol=1e-5)


def test_what_no_query_sees_of_keys_does_not_keep_them_apart():
    once = drawn(1, 1, LATENT, 8)
    k = torch.cat([once, once.clone()], 2)
    k[:, :, LATENT:, :4] += 3 * drawn(1, 1, LATENT, 4, seed=1)
    q = drawn(1, 1, 30, 8, seed=2)
    q[..., :4] = 0
    v, metric = drawn(1, 1, 2 * LATENT, 8, seed=3), query_metric(q, 0.5, 1)
    assert merged(k, v).k.shape[2] > LATENT
    found = merged(k, v, metric=metric)
    assert found.k.shape[2] == LATENT
    for got, expected in zip(attend(q, found, 0.5), attend_all(q, k, v, 0.5), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
    assert merged(k, v, 1.0, metric=metric).k.shape[2] == 2 * LATENT  # at 1 they are not equal


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_history_in_parts_is_the_history_at_once(cut):
    k, v = drifting(8)
    whole = merged(k, v, 0.6, 20)
    running = RunningMerge(k, MergeRule(0.6, 20, 0, LATENT, 2 * LATENT))
    for here in (slice(0, cut * LATENT), slice(cut * LATENT, None)):
        running.add(k[:, :, here], v[:, :, here], plain(k))
    for got, expected in zip(running.merged(v.dtype), whole, strict=True):
        assert torch.equal(got, expected)


def test_groups_combine_in_any_order():
    a, b, c = (
        Group(drawn(8, seed=n), drawn(8, seed=n + 9), n + 1, 0.0, n, False) for n in range(3)
    )
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    assert left.count == right.count == 6
    assert torch.equal(left.key, right.key)
    assert torch.equal(left.key, c.key)
    assert torch.allclose(left.value, right.value, atol=1e-6)


def test_those_that_were_joined_least_recently_leave_first():
    """The first latent comes again as the third: the second leaves before it."""
    first, second, new = (drawn(1, 1, LATENT, 8, seed=n) for n in range(3))
    k = torch.cat([first, second, first, new], 2)
    found = merged(k, k, 1.0, capacity=2 * LATENT)
    held = found.k[0, 0].tolist()
    assert sorted(held) == sorted(torch.cat([first, new], 2)[0, 0].tolist())
    assert found.bias.exp().sum().round() == 3 * LATENT


def test_what_leaves_is_all_of_its_group():
    k, v = drifting(12, heads=1)
    found = merged(k, v, 0.5, capacity=2 * LATENT)
    assert found.k.shape[2] == 2 * LATENT
    assert float(found.bias.exp().sum()) < k.shape[2]


def test_a_sink_stays_and_nothing_joins_it():
    once = drawn(1, 2, LATENT, 8)
    k = torch.cat([once.repeat(1, 1, 3, 1), drawn(1, 2, 9 * LATENT, 8, seed=1)], 2)
    v = drawn(*k.shape, seed=2)
    found = merged(k, v, 0.5, capacity=2 * LATENT, sink=1)
    here = slice(0, LATENT)
    assert torch.equal(found.k[:, :, here], once)
    assert torch.equal(found.v[:, :, here], v[:, :, here])
    assert torch.equal(found.bias[:, :, here], torch.zeros(1, 2, LATENT))


def test_no_slot_is_filled_beyond_the_cap_and_memory_stays(monkeypatch):
    running = RunningMerge(drawn(1, 1, 1, 8), MergeRule(0.5, 4 * LATENT, 0, LATENT, LATENT))
    held = []
    for n in range(30):
        x = drawn(1, 1, LATENT, 8, seed=n)
        running.add(x, x, plain(x))
        found = running.merged(x.dtype)
        held.append((found.k.shape[2], found.k.untyped_storage().nbytes()))
    assert set(held[8:]) == {held[-1]}
    assert held[-1][0] == 4 * LATENT


def test_free_slots_do_not_change_attention():
    k, v = drifting(6, heads=3)
    q, found = drawn(1, 3, 10, 8, seed=5), merged(k, v, 0.6)
    assert bool((found.bias == -math.inf).any())
    out, lse = attend(q, found, 0.4)
    for h in range(3):
        groups = by_definition(k[0, h], v[0, h], 0.6)
        expected, log_sum = attend_groups(q[0, h], groups, 0.4)
        assert torch.allclose(out[0, h], expected, atol=1e-5)
        assert torch.allclose(lse[0, h], log_sum, atol=1e-5)


def test_means_of_half_precision_values_are_taken_in_fp32():
    once = drawn(1, 1, LATENT, 8, dtype=torch.bfloat16)
    k, v = once.repeat(1, 1, 200, 1), drawn(1, 1, 200 * LATENT, 8, seed=1, dtype=torch.bfloat16)
    found = merged(k, v + 4, 1.0)
    mean = (v + 4).double().unflatten(2, (200, LATENT)).mean(2)
    assert found.v.dtype == torch.bfloat16
    assert torch.allclose(found.v.double(), mean, rtol=2**-8, atol=0)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_scores_move_by_no_more_than_is_said(threshold):
    """Each weight changes by a factor of at most exp(2 |q| farthest scale)."""
    k, v = drifting(10, heads=1)
    q, scale = drawn(1, 1, 20, 8, seed=3), 0.4
    metric = query_metric(q, scale, 1)
    found = merged(k, v, threshold, metric=metric)
    groups = by_definition(k[0, 0], v[0, 0], threshold, metric=metric[0, 0])
    worst = max(group.farthest for group in groups)
    assert float(found.farthest) == pytest.approx(worst, rel=1e-5)
    moved = scale * (q @ k.mT)[..., None] - scale * (q @ found.k.mT)[:, :, :, None]
    # Whichever key stands for one, it is at most as far as `farthest`; the nearest surely is.
    limit = scale * q.norm(dim=3).max() * worst
    assert bool((moved.abs().amin(4) <= limit + 1e-5).all())
    mean_square = moved.square().mean(2).amin(3).mean().sqrt()
    assert float(mean_square) <= float(found.moved) + 1e-5


def test_keys_that_are_no_numbers_merge_with_nothing():
    k, v = drifting(3)
    k[:, :, LATENT + 2] = math.nan
    found = merged(k, v, 0.5)
    assert bool(found.k.isnan().any())
    assert int(found.k.isnan().all(-1).sum()) == 2  # one a head, joined by none
