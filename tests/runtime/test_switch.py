"""Switched off, a model and its session compute everything, and nothing else changes."""

import contextvars
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mini_decode import REUSE, SIGMAS, Mini, compiled, inputs, level

import lipass
from lipass.kernels import registry
from lipass.policy.trajectory import parse_trajectory
from lipass.switch import is_off

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"sparse.tile": (1, 2, 2), "sparse.dense_tokens": 0, "sparse.budget": 0.1, **REUSE}


def rollout(model, session, history=6):
    x, w2c, text, cache = inputs(history)
    with torch.no_grad(), session:
        with session.chunk(poses=w2c[0, :history], query=w2c[0, history:]) as chunk:
            for step in chunk.steps(SIGMAS):
                v = model(x, level(step.sigma), w2c, text, cache)
                x = x + (step.sigma_next - step.sigma) * v
        return x, chunk


def test_disabled_block_computes_what_the_model_computes():
    model = Mini().eval()
    expected, _ = rollout(model, lipass.Session(preset="off"))
    fast = compiled(model, preset="all", **OPTIONS)
    options = {"preset": "all", **OPTIONS}
    with registry.force("sparse"):
        changed, _ = rollout(fast, lipass.Session(**options))
    assert not torch.allclose(changed, expected, atol=1e-4)
    with lipass.disabled():
        plain, chunk = rollout(fast, lipass.Session(**options))
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    assert chunk.context == list(range(6))
    assert chunk.plan.steps.reused == ()
    with registry.force("sparse"):
        again, _ = rollout(fast, lipass.Session(**options))
    assert torch.equal(again, changed)


def test_chunk_that_is_open_computes_calls_of_a_disabled_block():
    model = Mini().eval()
    fast = compiled(model, **REUSE)
    x, w2c, text, cache = inputs(4)
    session = lipass.Session(preset="cache", **REUSE)
    with torch.no_grad(), session, session.chunk(poses=w2c[0, :4], query=w2c[0, 4:]) as chunk:
        for step in chunk.steps(SIGMAS):
            with lipass.disabled():
                found = fast(x, level(step.sigma), w2c, text, cache)
            expected = model(x, level(step.sigma), w2c, text, cache)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert chunk.lookups == 0


def test_a_replay_in_a_disabled_block_computes_everything():
    model = Mini().eval()
    expected, _ = rollout(model, lipass.Session(preset="off"), history=16)
    session = lipass.Session(preset="all", **{"steps.overlap_min": 0, "context.memory_latents": 0})
    _, recorded = rollout(model, session, history=16)
    assert recorded.plan.steps.reused
    assert recorded.context != list(range(16))
    with lipass.disabled():
        plain, chunk = rollout(model, lipass.Session.replay([recorded.plan]), history=16)
    assert torch.equal(plain, expected)
    assert chunk.context == list(range(16))
    assert not chunk.plan.steps.reused


def test_process_with_lipass_off_has_no_passes():
    code = (
        "import torch, lipass\n"
        "from torch import nn\n"
        "fast = torch.compile(nn.Linear(2, 2), backend='light_interaction',"
        " options={'preset': 'all', 'inner': 'eager'})\n"
        "fast(torch.zeros(1, 2))\n"
        "session = lipass.Session(preset='all')\n"
        "w2c = torch.eye(4).repeat(24, 1, 1)\n"
        "with session, session.chunk(poses=w2c[:20], query=w2c[20:]) as chunk:\n"
        "    print(len(chunk.context), len(list(chunk.steps([1.0, 0.6, 0.3, 0.1, 0.0]))),"
        " len(lipass.report().to_dict()['passes']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"LIPASS": "off"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["20", "4", "0"], done.stderr


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("LIPASS", "no")
    with pytest.raises(ValueError, match="LIPASS must be 'on' or 'off', got 'no'"):
        rollout(Mini().eval(), lipass.Session(preset="off"))


def test_a_generator_that_is_drawn_from_other_contexts_stays_switched_off():
    def frames():
        with lipass.disabled():
            for _ in range(3):
                yield is_off()

    drawn = frames()
    assert [contextvars.copy_context().run(next, drawn) for _ in range(3)] == [True] * 3
    assert contextvars.copy_context().run(next, drawn, "end") == "end"
    assert not is_off()


def test_a_generator_that_is_dropped_in_another_context_leaves_nothing_off():
    def frames():
        with lipass.disabled():
            yield is_off()

    drawn = frames()
    assert contextvars.copy_context().run(next, drawn)
    contextvars.copy_context().run(drawn.close)
    assert not is_off()


def test_a_thread_that_computes_for_a_disabled_block_is_off():
    model = Mini().eval()
    fast = compiled(model, **REUSE)
    x, w2c, text, cache = inputs(4)
    session = lipass.Session(preset="cache", **REUSE)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool, session:
        with session.chunk(poses=w2c[0, :4], query=w2c[0, 4:]) as chunk:
            for step in chunk.steps(SIGMAS):
                given = x, level(step.sigma), w2c, text, cache
                with lipass.disabled():
                    assert pool.submit(is_off).result()
                    found = pool.submit(torch.no_grad()(fast), *given).result()
                torch.testing.assert_close(found, model(*given), atol=1e-5, rtol=1e-5)
                assert not pool.submit(is_off).result()
        assert chunk.lookups == 0
        with lipass.disabled(), session.chunk(poses=w2c[0, :4], query=w2c[0, 4:]):
            assert pool.submit(is_off).result()


def test_a_thread_that_computes_for_nobody_is_not_off():
    with lipass.disabled(), ThreadPoolExecutor(1) as pool:
        assert not pool.submit(is_off).result()


def test_blocks_lie_in_each_other_and_decorate():
    @lipass.disabled()
    def inside(depth):
        return is_off() and (depth == 0 or inside(depth - 1))

    with lipass.disabled():
        assert inside(2)
        assert is_off()
    assert not is_off()


def test_a_disabled_block_reads_all_that_attend_is_given():
    class Attending(torch.nn.Module):
        def forward(self, q, k, v, w2c):
            history = ("history", k[:, :, :-64], v[:, :, :-64], (k.shape[2] // 16 - 4, 4, 4))
            current = ("current", k[:, :, -64:], v[:, :, -64:], (4, 4, 4))
            return lipass.attend(q + w2c.mean(), [history, current], site="one")

    frames = 28
    q, (k, v) = torch.randn(1, 2, 64, 16), torch.randn(2, 1, 2, 16 * frames, 16)
    turn = parse_trajectory(f"left-{frames - 1}")[None]
    model = Attending()
    expected = model(q, k, v, turn)
    fast = compiled(model, preset="context")
    with torch.no_grad():
        assert not torch.allclose(fast(q, k, v, turn), expected, atol=1e-4)
        with lipass.disabled():
            torch.testing.assert_close(fast(q, k, v, turn), expected)
