"""A rollout of the example through the backend: what a session changes, and what it must not."""

import threading

import pytest
import torch

import lipass
from lipass.examples.tinyworld.camera import relative_to
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.rollout import SIGMAS, Rollout, chunk_noise, roll_out
from lipass.policy.trajectory import parse_trajectory

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)
PATH = parse_trajectory("left-15, right-16", step_deg=6.0)
OPTIONS = {"preset": "all", "inner": "eager", "hfov_deg": 75.0, "vfov_deg": 75.0}


@pytest.fixture(scope="module")
def model() -> TinyWorld:
    torch.manual_seed(0)
    tiny = TinyWorld(TINY)
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tiny.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="light_interaction", options=OPTIONS, dynamic=True)


@pytest.fixture(scope="module")
def given() -> torch.Tensor:
    return torch.randn(16, 16, 4, 4, generator=torch.Generator().manual_seed(3))


def text_of(model: TinyWorld, prompt: str):
    return model.text(tokenize(prompt)[None])


def run(call, model, given, *, seed: int, prompt: str = "a room", **options) -> Rollout:
    with lipass.Session(**OPTIONS | options) as session:
        return roll_out(call, text_of(model, prompt), given, PATH, seed=seed, session=session)


def test_walls_go_with_the_latents_that_the_session_keeps(model, given):
    walls = torch.randn(len(PATH), 16, 4, 4)
    calls = []

    def call(latents, sigma, w2c, text, history=None, told=None):
        calls.append((history is None, told))
        return model(latents, sigma, w2c, text, history, told)

    with lipass.Session(**OPTIONS) as session:
        made = roll_out(
            call, text_of(model, "a room"), given, PATH, walls, seed=0, session=session
        )
    prefills = [told for prefill, told in calls if prefill]
    assert any(len(chunk.context) < chunk.start for chunk in made.chunks)
    for chunk, told in zip(made.chunks, prefills, strict=True):
        assert torch.equal(told[0].transpose(0, 1), walls[chunk.context])
    own = [told for prefill, told in calls if not prefill]
    assert torch.equal(own[0][0].transpose(0, 1), walls[16:20])
    assert torch.equal(own[-1][0].transpose(0, 1), walls[-4:])


def test_first_and_last_step_compute_in_every_chunk(compiled, model, given):
    with lipass.Session(**OPTIONS) as session:
        roll_out(compiled, text_of(model, "a room"), given, PATH, seed=0, session=session)
    plans = [c.plan for c in lipass.report().chunks if c.session == session.number]
    assert len(plans) == 4
    for plan in plans:
        assert not {0, 3} & set(plan.steps.reused)
    assert any(plan.steps.reused for plan in plans)


def test_merged_steps_equal_looked_up_steps(compiled, model, given):
    merged = run(compiled, model, given, seed=0)
    looked_up = run(compiled, model, given, seed=0, **{"steps.form": "lookup"})
    assert torch.allclose(merged.latents, looked_up.latents, atol=1e-4)
    assert [c.steps_computed for c in merged.chunks] == [
        c.steps_computed for c in looked_up.chunks
    ]


def test_interleaved_sessions_equal_separate_runs(compiled, model, given):
    wanted = {seed: run(compiled, model, given, seed=seed).latents for seed in (1, 2)}
    barrier, made = threading.Barrier(2), {}

    def call(*args):
        barrier.wait(timeout=60)
        return compiled(*args)

    def work(seed: int) -> None:
        with torch.no_grad():
            made[seed] = run(call, model, given, seed=seed).latents

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, latents in wanted.items():
        assert torch.equal(made[seed], latents)


@torch.no_grad()
def branch(compiled, model, given, prompts: list[str]) -> list[torch.Tensor]:
    """Denoise one chunk once a prompt, the prompts called in turn within each step."""
    texts = [text_of(model, prompt) for prompt in prompts]
    start = len(given)
    out = [chunk_noise(0, start, (1, 16, CHUNK_LATENTS, 4, 4)) for _ in prompts]
    options = OPTIONS | {"steps.form": "lookup", "steps.overlap_min": 0.0}
    with lipass.Session(**options) as session:
        query = PATH[start : start + CHUNK_LATENTS]
        with session.chunk(poses=PATH[:start], query=query, latents=given) as chunk:
            keep = chunk.context
            w2c = relative_to(torch.cat([PATH[keep], query]), PATH[start])[None]
            clean = given[keep].transpose(0, 1)[None]
            past = [compiled(clean, torch.zeros(1, len(keep)), w2c, text) for text in texts]
            for step in chunk.steps(SIGMAS):
                level = torch.full((1, CHUNK_LATENTS), step.sigma)
                for i, text in enumerate(texts):
                    with session.stream(prompts[i]):
                        velocity = compiled(out[i], level, w2c, text, past[i])
                    out[i] = out[i] + (step.sigma_next - step.sigma) * velocity
            assert chunk.lookups == 2 * len(prompts)
    return out


def test_guidance_branches_equal_separate_runs(compiled, model, given):
    prompts = ["a room at day", "a room at night"]
    together = branch(compiled, model, given, prompts)
    assert not torch.equal(*together)
    for prompt, latents in zip(prompts, together, strict=True):
        assert torch.equal(branch(compiled, model, given, [prompt])[0], latents)


def test_exact_preset_equals_the_plain_model(model, given):
    exact = torch.compile(
        model, backend="light_interaction", options={"preset": "exact", "inner": "eager"}
    )
    text = text_of(model, "a room")
    plain = roll_out(model, text, given, PATH, seed=0).latents
    made = roll_out(exact, text, given, PATH, seed=0).latents
    assert torch.allclose(made, plain, rtol=1e-4, atol=1e-5)


def test_context_is_pruned_by_torch_compile_alone(model, given):
    """Cameras are graph inputs: latents that show nothing are dropped without a session."""
    from lipass.kernels import registry

    torch._dynamo.reset()
    pruned = torch.compile(
        model, backend="light_interaction",
        options=OPTIONS | {"preset": "context", "context.window_chunks_max": 1},
    )  # fmt: skip
    away = parse_trajectory("left-19", step_deg=18.0)[: len(given) + CHUNK_LATENTS]
    w2c = relative_to(away, away[len(given)])[None]
    registry.reset_telemetry()
    with torch.no_grad():
        clean = given.transpose(0, 1)[None]
        text = text_of(model, "a room")
        past = pruned(clean, torch.zeros(1, len(given)), w2c, text)
        pruned(torch.randn(1, 16, CHUNK_LATENTS, 4, 4), torch.ones(1, 4), w2c, text, past)
    decode = [c for c in registry.telemetry().values() if c.role == "decode"]
    assert decode
    assert all(counts.dropped_latents >= 4 for counts in decode)
