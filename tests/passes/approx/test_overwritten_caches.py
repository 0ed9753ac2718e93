"""Steps that write to a cache are reused where each writes over what the one before wrote."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipass
from lipass.adapters.checkouts.poses import there_and_back

CHUNK, LATENT = 2, 24
SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
OPTIONS = {"chunk_latents": CHUNK, "steps.form": "lookup"}


class Model(nn.Module):
    """Write keys to a preallocated cache, and read it from its start."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(8, 64), nn.Linear(64, 192), nn.Linear(64, 8)

    def forward(self, x, sigma, caches, start):
        h = self.embed(x.flatten(2).transpose(1, 2)) * (1 + sigma)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 32)).unbind(2)
        o = self.attend(q, k, v, caches, start, start + h.shape[1])
        return self.out(o.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)

    def attend(self, q, k, v, caches, start, end):
        caches["k"][:, start:end], caches["v"][:, start:end] = k, v
        keys, values = (caches[name][:, :end].transpose(1, 2) for name in "kv")
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)


class Compounding(Model):
    """Mix what the step before has written with what this one does."""

    def attend(self, q, k, v, caches, start, end):
        k = 0.5 * k + 0.5 * caches["k"][:, start:end]
        return super().attend(q, k, v, caches, start, end)


class Positions(Model):
    """Write where a tensor says."""

    def attend(self, q, k, v, caches, start, end):
        caches["k"].index_copy_(1, caches["at"] + start, k)
        caches["v"].index_copy_(1, caches["at"] + start, v)
        keys, values = (caches[name][:, :end].transpose(1, 2) for name in "kv")
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)


def _rollout(model, session, chunks=4, between=lambda caches: None):
    torch.manual_seed(1)
    caches = {name: torch.zeros(1, 400, 2, 32) for name in "kv"}
    caches["at"] = torch.arange(CHUNK * LATENT)
    w2c = there_and_back(chunks, CHUNK)
    counts = []
    for i in range(chunks):
        start = i * CHUNK
        x, own = torch.randn(1, 8, CHUNK, 4, 6), [caches["k"][:, start * LATENT :].clone()]
        with session.chunk(
            poses=w2c[:start] if i else None, query=w2c[start : start + CHUNK]
        ) as chunk:
            for step in chunk.steps(SIGMAS):
                velocity = model(x, torch.tensor(step.sigma), caches, start * LATENT)
                x = x + (step.sigma_next - step.sigma) * velocity
                own.append(caches["k"][:, start * LATENT :].clone())
                between(caches)
        # what a step that computes writes differs from what was there
        counts.append([not torch.equal(a, b) for a, b in itertools.pairwise(own)])
    return counts


@pytest.fixture
def rolled(fresh_dynamo):
    def roll(kind, **given):
        torch.manual_seed(0)
        model = kind().eval().requires_grad_(False)
        options = {**OPTIONS, "preset": "cache", "inner": "eager"}
        fast = torch.compile(model, backend="light_interaction", options=options)
        with lipass.Session(preset="cache", **OPTIONS) as session:
            computed = _rollout(fast, session, **given)
        return computed, list(lipass.report().chunks)[-1]

    return roll


def test_a_reused_step_is_not_computed_and_the_last_write_stands(rolled):
    computed, last = rolled(Model)
    assert computed[-1] == computed[-2] == [True, False, False, True]
    assert (last.lookups, last.misses, last.steps_skipped) == (2, 0, 2)


@pytest.mark.filterwarnings("ignore:an approximate session must leave something out")
def test_a_cache_that_others_write_to_between_steps_computes(rolled):
    computed, last = rolled(Model, between=lambda caches: caches["v"][:, :1].mul_(0.5))
    assert computed[-1] == [True] * 4
    assert (last.lookups, last.steps_skipped) == (0, 0)
    assert next(iter(last.why_missed)).startswith("its input")


@pytest.mark.parametrize("kind", [Compounding, Positions])
@pytest.mark.filterwarnings("ignore:an approximate session must leave something out")
def test_other_writes_are_refused_with_the_name_of_the_cache(rolled, kind):
    computed, last = rolled(kind)
    assert computed[-1] == [True] * 4
    assert (last.lookups, last.steps_skipped) == (0, 0)
    notes = [note for one in lipass.report().passes for note in one.notes]
    if kind is Compounding:
        assert any("writes to the input caches['k']" in note for note in notes), notes
