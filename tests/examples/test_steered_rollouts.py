"""The example's loops under a prompt that changes: what is encoded with which text."""

import itertools

import pytest
import torch

import lipass
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.examples.tinyworld.stream_rollout import GrownCache, RingCache, chunks_of, stream
from lipass.policy.steering import Steering
from lipass.policy.trajectory import parse_trajectory

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)
PATH = parse_trajectory("left-15, right-16", step_deg=6.0)


def small():
    torch.manual_seed(0)
    tiny = TinyWorld(TINY)
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tiny.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def given() -> torch.Tensor:
    return torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(3))


def texts(model, *prompts):
    return [model.text(tokenize(prompt)[None]) for prompt in prompts]


def test_context_is_encoded_with_the_text_that_it_was_made_under(given):
    model, told = small(), []
    day, night = texts(model, "a room at day", "a room at night")

    def call(latents, sigma, w2c, text, history=None, walls=None):
        told.append((history is None, text is day, latents.shape[2]))
        return model(latents, sigma, w2c, text, history, walls)

    def say(start):
        if start == len(given):
            session.steer(night, policy="hard")

    with lipass.Session(preset="off") as session:
        session.steer(day)
        made = roll_out(call, None, given, PATH, seed=1, session=session, progress=say)
        plain = roll_out(model, day, given, PATH, seed=1)
    encoded = [(by_day, count) for prefill, by_day, count in told if prefill]
    assert encoded[:6] == [
        (True, 8), (True, 12), (True, 12), (False, 4), (True, 12), (False, 8),
    ]  # fmt: skip
    assert [by_day for by_day, _ in encoded[6:]] == [True, False] * (len(encoded[6:]) // 2)
    same = made.latents[: len(given) + CHUNK_LATENTS]
    assert torch.equal(same, plain.latents[: len(same)])
    assert not torch.allclose(made.latents[len(same) :], plain.latents[len(same) :])


def test_a_single_latent_is_encoded_beside_a_neighbour(given):
    """Compiled for any number of latents, a graph is not for one."""
    model, counts = small(), []
    alone = Steering(policy="flush", sink_latents=0, newest_latents=1)
    day, night = texts(model, "a room at day", "a room at night")

    def call(latents, sigma, w2c, text, history=None, walls=None):
        counts.append(latents.shape[2])
        return model(latents, sigma, w2c, text, history, walls)

    def say(start):
        if start == len(given):
            session.steer(night, policy=alone)

    with lipass.Session(preset="off") as session:
        session.steer(day)
        roll_out(call, None, given, PATH[:24], seed=1, session=session, progress=say)
    assert min(counts) == 2
    plan = lipass.report().chunks[-1].plan
    assert plan.context.indices == [*range(11, 20)]


@pytest.fixture(scope="module")
def streaming(untrained_stream):
    return untrained_stream(TINY)


def steered(model, given, policy, cache, chunks=6):
    """Roll out with a change behind the third chunk; what the cache held in front of each."""
    day, night = texts(model, "a room at day", "a room at night")
    held, made = [], []
    with lipass.Session(preset="off") as session:
        session.steer(day, policy=policy)
        w2c = PATH[None, : chunks * CHUNK_LATENTS]
        recorded = given.transpose(0, 1)[None]
        rest = chunks_of(model, None, recorded, w2c, seed=1, cache=cache, session=session)
        for chunk in rest:
            made.append(chunk.latents)
            held.append(list(cache.held))
            if len(made) == 3:
                session.steer(night, 2, policy)
    return torch.cat(made, 2), held


def test_a_cache_gives_up_what_is_flushed(streaming, given):
    _, held = steered(streaming, given, "flush", GrownCache())
    assert held[2] == list(range(12))
    assert held[3] == [0, *range(8, 16)]
    assert held[4] == [0, *range(8, 20)]


def test_a_cache_is_encoded_anew_in_its_order(streaming, given):
    hard, _ = steered(streaming, given, "hard", GrownCache(), chunks=4)
    anew, held = steered(streaming, given, "recache", GrownCache(), chunks=4)
    assert held[3] == list(range(16))
    assert torch.equal(hard[:, :, :12], anew[:, :, :12])
    assert not torch.allclose(hard[:, :, 12:], anew[:, :, 12:])


def test_encoding_anew_under_the_same_prompt_changes_nothing(streaming, given):
    (day,) = texts(streaming, "a room at day")
    with lipass.Session(preset="off") as session:
        session.steer(day)
        w2c, recorded = PATH[None, :20], given.transpose(0, 1)[None]
        rest = chunks_of(
            streaming, None, recorded, w2c, seed=1, cache=GrownCache(), session=session
        )
        made = list(itertools.islice(rest, 3))
        session.steer(day, policy="recache")
        made += rest
    plain = stream(streaming, day, recorded, w2c, seed=1, cache=GrownCache())
    torch.testing.assert_close(torch.cat([one.latents for one in made], 2), plain)


def test_a_ring_is_not_flushed(streaming, given):
    with pytest.raises(ValueError, match="a ring gives up the oldest chunk, got latents"):
        steered(streaming, given, "flush", RingCache(streaming, 6), chunks=4)
