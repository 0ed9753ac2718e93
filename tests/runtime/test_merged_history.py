"""What a session keeps of merged histories: what is new is added, another is merged anew."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.kernels import registry
from lipass.kernels.merge.running import MergeRule, RunningMerge, query_metric

CHUNK, LATENT = 12, 6
RULE = MergeRule(0.8, None, 0, LATENT, CHUNK)


def chunk(n, batch=1, dtype=torch.float32):
    """Keys and values of chunk `n`; chunks look like each other."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(batch, 2, LATENT, 8, generator=torch.Generator().manual_seed(99))
    k = base.repeat(1, 1, 2, 1) + 0.2 * torch.randn(batch, 2, CHUNK, 8, generator=generator)
    return k.to(dtype), torch.randn(k.shape, generator=generator).to(dtype)


def joined(*numbers, **options):
    parts = [chunk(n, **options) for n in numbers]
    return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)


def queries(batch=1):
    return torch.randn(batch, 2, 20, 8, generator=torch.Generator().manual_seed(5))


def anew(k, v, rule=RULE):
    running = RunningMerge(k, rule)
    running.add(k, v, query_metric(queries(), 0.3, 2))
    return running.merged(v.dtype)


def equal(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def session():
    with lipass.Session(preset="exact") as opened:
        yield opened


def ask(session, k, v, rule=RULE, site="0", stream="main"):
    with session.histories.answering(stream):
        return registry.answer_of("merge_history")(queries(len(k)), k, v, 0.3, rule, site)


def counts(session):
    return session.histories.anew, session.histories.added


def test_steps_of_a_chunk_merge_once(session):
    k, v = joined(0, 1)
    first = ask(session, k, v)
    assert all(ask(session, k, v) is first for _ in range(3))
    assert equal(first, anew(k, v))
    assert counts(session) == (1, 0)


def test_a_cache_that_grows_is_added_to(session):
    for n in range(1, 6):
        found = ask(session, *joined(*range(n)))
    assert equal(found, anew(*joined(*range(5))))
    assert counts(session) == (1, 4)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_last_chunk_that_is_shorter_goes_on_with_what_was_merged(session, resumed):
    """How long a chunk is says nothing about the history that it reads."""
    for n in range(1, 4):
        ask(session, *joined(*range(n)))
    if resumed:
        session = lipass.Session.resume(session.snapshot())
    found = ask(session, *joined(*range(4)), RULE._replace(chunk_tokens=LATENT))
    assert equal(found, anew(*joined(*range(4))))
    assert counts(session) == (1, 3)
    again = ask(session, *joined(*range(4)), RULE._replace(threshold=0.9))
    assert not equal(again, found)
    assert counts(session) == (2, 3)


def test_a_snapshot_from_before_goes_on_with_what_was_merged(session):
    ask(session, *joined(0))
    snapshot = session.snapshot()
    (site,) = snapshot.parts["histories"]["sites"]
    site[2] = [*RULE]  # as it was written
    resumed = lipass.Session.resume(snapshot)
    ask(resumed, *joined(0, 1))
    assert counts(resumed) == (1, 1)


def test_copies_of_the_same_history_are_the_same(session):
    """As in a graph that is functional, and makes its views anew in each call."""
    k, v = joined(0, 1)
    first = ask(session, k, v)
    assert ask(session, k.clone(), v.clone()) is first
    assert counts(session) == (1, 0)


def test_a_cache_written_in_place_is_seen(session):
    k, v = (x.repeat(1, 1, 3, 1) for x in chunk(0))
    ask(session, k[:, :, :CHUNK], v[:, :, :CHUNK])
    new = chunk(1)
    k[:, :, CHUNK : 2 * CHUNK], v[:, :, CHUNK : 2 * CHUNK] = new
    found = ask(session, k[:, :, : 2 * CHUNK], v[:, :, : 2 * CHUNK])
    assert equal(found, anew(*joined(0, 1)))
    assert counts(session) == (1, 1)


@pytest.mark.parametrize("form", ["ring", "shift"])
def test_rows_that_leave_stay_merged_while_there_is_room(session, form):
    """Whether the oldest are written over or all others move up."""
    rule = RULE._replace(threshold=1.0)
    ask(session, *joined(0, 1, 2), rule)
    given = joined(3, 1, 2) if form == "ring" else joined(1, 2, 3)
    found = ask(session, *given, rule)
    assert counts(session) == (1, 1)
    # Nothing is equal, so there is room for as many rows as are given: those that were given.
    rows = found.k[0, 0].tolist()
    assert sorted(rows) == sorted(given[0][0, 0].tolist())
    alike = ask(session, *joined(0, 1, 2), site="1"), ask(session, *given, site="1")
    assert float(alike[1].bias.exp().sum()) == 2 * 4 * CHUNK  # at 0.8 all are there still


def test_a_ring_that_comes_round_for_long_is_what_it_holds(session):
    rule, ring = RULE._replace(threshold=1.0), [0, 1, 2]
    for n in range(3, 12):
        ask(session, *joined(*ring), rule)
        ring[n % 3] = n
    found = ask(session, *joined(*ring), rule)
    assert counts(session) == (1, 9)
    assert sorted(found.k[0, 1].tolist()) == sorted(joined(*ring)[0][0, 1].tolist())


def test_a_sink_that_a_ring_writes_over_is_none_any_more(session):
    rule, ring = MergeRule(1.0, None, LATENT, LATENT, CHUNK), [0, 1, 2]
    for n in range(3, 9):
        ask(session, *joined(*ring), rule)
        ring[n % 3] = n
    found = ask(session, *joined(*ring), rule)
    assert sorted(found.k[0, 1].tolist()) == sorted(joined(*ring)[0][0, 1].tolist())


def test_a_sink_that_stays_is_kept_while_a_window_moves(session):
    rule = MergeRule(1.0, None, CHUNK, LATENT, CHUNK)
    ask(session, *joined(0, 1, 2), rule)
    for n in range(3, 7):
        found = ask(session, *joined(0, n - 1, n), rule)
    assert counts(session) == (1, 4)
    assert torch.equal(found.k[:, :, :CHUNK], chunk(0)[0])


def test_histories_that_share_nothing_but_the_sink_are_two(session):
    """As those of two rollouts of one prompt, or of branches of guidance without names."""
    rule = MergeRule(1.0, None, CHUNK, LATENT, CHUNK)
    ask(session, *joined(0, 1, 2), rule)
    found = ask(session, *joined(0, 5, 6), rule)
    assert equal(found, anew(*joined(0, 5, 6), rule))
    assert counts(session) == (2, 0)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((5, 6, 7), "another rollout"),
        ((0,), "shorter"),
        ((0, 1), "shorter by a chunk"),
        ((0, 1, 7), "another last chunk, as after going back"),
        ((0, 1, 7, 8), "the same, and on"),
        ((7, 0, 1, 2), "an older one in front"),
    ],
)
def test_another_history_is_merged_anew(session, given, why):
    ask(session, *joined(0, 1, 2))
    found = ask(session, *joined(*given))
    if given == (7, 0, 1, 2):  # rows have no order, so it has one chunk more
        assert counts(session) == (1, 1)
        return
    assert counts(session) == (2, 0), why
    assert equal(found, anew(*joined(*given)))


def test_equal_chunks_count_as_often_as_they_come(session):
    """A camera that stands still may fill a cache with the same rows."""
    rule = RULE._replace(threshold=1.0)
    for n in range(1, 5):
        found = ask(session, *joined(*[0] * n), rule)
    assert float(found.bias.exp().sum()) == pytest.approx(2 * 4 * CHUNK)
    assert counts(session) == (1, 3)


def test_streams_branches_and_sites_are_kept_apart(session):
    one, two = joined(0, 1), joined(5, 6)
    first = ask(session, *one), ask(session, *two, stream="b"), ask(session, *two, site="1")
    with session.stream("unconditional"):
        other = ask(session, *two)
    again = ask(session, *one), ask(session, *two, stream="b"), ask(session, *two, site="1")
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert other is not first[0]
    assert counts(session) == (4, 0)


def test_another_batch_is_refused_and_the_session_goes_on(session):
    before = ask(session, *joined(0, 1))
    with pytest.raises(ValueError, match=r"must keep its batch.*\[2, 2, L, 8\].*after \[1, 2"):
        ask(session, *joined(0, 1, batch=2))
    assert equal(ask(session, *joined(0, 1)), before)
    assert equal(ask(session, *joined(0, 1, 2)), anew(*joined(0, 1, 2)))


def test_keys_that_are_no_numbers_are_refused_and_the_session_goes_on(session):
    ask(session, *joined(0, 1))
    k, v = joined(0, 1, 2)
    bad = k.clone()
    bad[0, 0, -3, 1] = math.nan
    with pytest.raises(ValueError, match="must be finite to be merged, got 1 of 12 tokens"):
        ask(session, bad, v)
    assert equal(ask(session, k, v), anew(k, v))


def test_a_closed_session_keeps_nothing():
    with lipass.Session(preset="exact") as session:
        ask(session, *joined(0, 1))
    ask(session, *joined(0, 1))
    assert counts(session) == (2, 0)


def test_inference_mode_and_no_grad_may_take_turns(session):
    with torch.inference_mode():
        ask(session, *joined(0))
    ask(session, *joined(0, 1))
    with torch.inference_mode():
        found = ask(session, *joined(0, 1, 2))
    assert equal(found, anew(*joined(0, 1, 2)))
    assert counts(session) == (1, 2)


def test_bf16(session):
    for n in range(1, 4):
        found = ask(session, *joined(*range(n), dtype=torch.bfloat16))
    assert equal(found, anew(*joined(0, 1, 2, dtype=torch.bfloat16)))
    assert found.k.dtype == found.v.dtype == torch.bfloat16
    assert found.bias.dtype == torch.float32


class Stream(nn.Module):
    """Denoise a chunk against text and a cache, or leave its keys and values in the cache."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x, sigma, text, cache=None, refresh=False):
        b, _, t, y, xx = x.shape
        rows = torch.cat([x, sigma.expand(b, 1, t, y, xx)], 1).permute(0, 2, 3, 4, 1)
        h = self.embed(rows).flatten(1, 3)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        keys, values = k, v
        if cache is not None:
            keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        joined = torch.cat([text, keys], 2), torch.cat([text, values], 2)
        h = h + F.scaled_dot_product_attention(q, *joined).transpose(1, 2).flatten(2)
        if refresh:
            return keys, values
        return self.head(h).view(b, t, y, xx, 4).permute(0, 4, 1, 2, 3)


class Rollout:
    """Goes on chunk by chunk, so that several may take turns."""

    def __init__(self, model, seed, preset="exact"):
        self.model, self.session = model, lipass.Session(preset=preset)
        self.generator = torch.Generator().manual_seed(seed)
        self.cache, self.made = None, []
        self.look = torch.randn(1, 4, 2, 3, 4, generator=self.generator)

    @torch.no_grad()
    def chunk(self):
        n, text = len(self.made), torch.ones(1, 2, 5, 8)
        poses = torch.eye(4).repeat(4 * n + 4, 1, 1)
        with self.session.chunk(poses=poses[: 4 * n] if n else None, query=poses[4 * n :]):
            x = self.look + 0.1 * torch.randn(1, 4, 2, 3, 4, generator=self.generator)
            for sigma in (1.0, 0.5) if n else ():
                x = x - 0.5 * self.model(x, torch.tensor(sigma), text, self.cache)
            self.cache = self.model(x, torch.tensor(0.0), text, self.cache, refresh=True)
        self.made.append(x)


@pytest.mark.usefixtures("fresh_dynamo")
def test_interleaved_sessions_are_bit_for_bit_those_that_go_alone():
    """The receipt says how many keys are left, and what merging may have changed."""
    torch.manual_seed(0)
    options = {"preset": "exact", "inner": "eager", "merge": True, "merge.kv_tokens": 48}
    fast = torch.compile(Stream(), backend="light_interaction", options=options, dynamic=True)
    alone, together = ([Rollout(fast, seed) for seed in (1, 2)] for _ in range(2))
    for one in alone:
        for _ in range(6):
            one.chunk()
    for _ in range(6):
        for one in together:
            one.chunk()
    for one, expected in zip(together, alone, strict=True):
        assert torch.equal(torch.cat(one.made, 2), torch.cat(expected.made, 2))
        assert counts(one.session) == (1, 4)
        one.session.close()
        expected.session.close()
    (site,) = (one for one in lipass.report().sites.values() if one.role == "decode")
    assert (site.action, site.reason) == ("rewritten", "decode, history merged at 0.7")
    assert 0.3 < site.density < 0.95
    assert 0 < site.score_error < site.score_error_max
    said = r"scores moved by [\d.]+ \(root mean square\), by [\d.]+ at most"
    assert re.search(said, " ".join(lipass.report().table().split()))


@pytest.mark.filterwarnings("error::lipass.LipassWarning")
@pytest.mark.usefixtures("fresh_dynamo")
def test_under_all_a_merged_history_is_neither_pruned_nor_made_sparse():
    """Poses choose latents, and merging reads them all: the site says so, and nobody is warned."""
    torch.manual_seed(0)
    options = {"preset": "all", "inner": "eager", "merge": True, "context.chunk_latents": 4}
    fast = torch.compile(Stream(), backend="light_interaction", options=options, dynamic=True)
    rollout = Rollout(fast, 1, "all")
    for _ in range(6):
        rollout.chunk()
    assert counts(rollout.session) == (1, 4)
    assert lipass.report().chunks[-1].latents_read == 10
    rollout.session.close()
    (site,) = (one for one in lipass.report().sites.values() if one.role == "decode")
    assert site.reason.startswith("decode, history merged at 0.7; its history is merged")
    assert site.density < 1
