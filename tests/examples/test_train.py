"""Training: what a batch holds, how own rollouts go on, and that a few steps run and resume."""

import pytest
import torch

from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.learner import working_copy
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, TinyWorld
from lipass.examples.tinyworld.own_rollouts import OwnRollouts
from lipass.examples.tinyworld.train_batches import LatentWalks, Sampler
from lipass.examples.tinyworld.train_free import (
    FreeOptions,
    FreeTrainer,
    imagine,
    picture_error,
)
from lipass.examples.tinyworld.train_world import (
    Phase,
    Trainer,
    faster_dtype,
    prefill,
    velocity_loss,
)

FRAMES = 20
TINY = ModelConfig(rows=4, columns=4, width=32, heads=1, blocks=1, mlp_ratio=1, text_width=8)


@pytest.fixture
def walks() -> LatentWalks:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, FRAMES, 16, 4, 4, generator=generator).half()
    w2c = torch.eye(4).expand(3, FRAMES, 4, 4).contiguous()
    w2c[..., 0, 3] = torch.arange(FRAMES) * 0.1
    tokens = torch.zeros(3, 2, 32, dtype=torch.long)
    return LatentWalks(latents, w2c, tokens, torch.eye(FRAMES).expand(3, -1, -1).contiguous())


def test_a_recorded_batch_has_its_context_outside_its_targets(walks):
    batch = Sampler(walks, batch=4, targets=1, seed=0).draw(8)
    assert batch.context.shape == (4, 8, 16, 4, 4)
    assert batch.targets.shape == (4, 1, CHUNK_LATENTS, 16, 4, 4)
    for context, target in zip(batch.context, batch.targets[:, 0], strict=True):
        assert not any(torch.equal(x, y) for x in context for y in target)


def test_a_rollout_keeps_what_was_generated_and_starts_anew_at_the_end_of_its_walk(walks):
    rollouts = OwnRollouts(walks, lanes=1, batch=1, targets=2, seed=0)
    while True:
        lane = rollouts.lanes[0]
        before = lane.latents
        batch = rollouts.draw(CHUNK_LATENTS)
        start = len(before)
        truth = walks.latents[lane.walk, lane.variant, start : start + CHUNK_LATENTS].float()
        assert torch.equal(batch.targets[0, 0], truth)
        assert torch.equal(batch.targets[0, 0], batch.targets[0, 1])
        assert torch.equal(batch.context[0], before[-CHUNK_LATENTS:])
        rollouts.append(torch.zeros_like(rollouts.noise()))
        if rollouts.lanes[0] is not lane:
            break
        assert torch.equal(lane.latents[:start], before)
        assert len(lane.latents) == start + CHUNK_LATENTS
    assert start + CHUNK_LATENTS > FRAMES - CHUNK_LATENTS


def test_a_rollout_is_shown_to_the_model_without_noise(walks):
    batch = OwnRollouts(walks, lanes=4, batch=4, targets=1, seed=0).draw(CHUNK_LATENTS)
    assert batch.context_noise.tolist() == [0.0] * 4


def test_a_rollout_that_is_too_short_gets_less_context_than_asked(walks):
    rollouts = OwnRollouts(walks, lanes=2, batch=2, targets=1, seed=0)
    shortest = min(len(lane.latents) for lane in rollouts.lanes)
    assert rollouts.draw(FRAMES).context.shape[1] == shortest


def test_bf16_training_gives_nearly_the_loss_of_fp32(walks):
    torch.manual_seed(0)
    model = TinyWorld(TINY)
    batch = Sampler(walks, batch=4, targets=2, seed=0).draw(8)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        working = working_copy(model, dtype)
        losses.append(velocity_loss(prefill(working, batch, generator), batch, generator).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert faster_dtype(model, batch) in (torch.float32, torch.bfloat16)


def test_training_runs_on_own_rollouts_and_resumes(walks):
    torch.manual_seed(0)
    phases = [Phase(2.0, lambda: walks, 2, 2, (CHUNK_LATENTS, 8), share_own=0.5)]
    trainer = Trainer(TinyWorld(TINY))
    trainer.run(phases, 2.0, lambda state: None)
    assert trainer.step > 0
    again = Trainer(TinyWorld(TINY))
    again.load(trainer.state())
    again.run(phases, trainer.elapsed_s + 0.5, lambda state: None)
    assert again.step > trainer.step
    assert all(torch.isfinite(p).all() for p in again.model.parameters())


def test_a_free_rollout_begins_anywhere_in_its_walk_and_ends_after_its_chunks(walks):
    rollouts = OwnRollouts(
        walks, lanes=8, batch=8, targets=1, seed=0, free_share=1.0, free_chunks=2
    )
    first = list(rollouts.lanes)
    assert len({lane.first for lane in first}) > 2
    for chunk in (1, 2):
        batch = rollouts.draw(CHUNK_LATENTS)
        for row, i in enumerate(rollouts._drawn):
            lane = rollouts.lanes[i]
            start = lane.first + chunk * CHUNK_LATENTS
            recorded = walks.latents[lane.walk, lane.variant, start : start + CHUNK_LATENTS]
            if lane is first[i]:
                assert torch.equal(batch.targets[row, 0], recorded.float())
        rollouts.append(rollouts.noise())
        if chunk == 1:
            assert any(a is b for a, b in zip(first, rollouts.lanes, strict=True))
    assert not any(a is b for a, b in zip(first, rollouts.lanes, strict=True))


def test_an_imagined_chunk_has_the_gradient_of_its_last_step_alone(walks):
    torch.manual_seed(0)
    model, calls = TinyWorld(TINY), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    rollouts = OwnRollouts(walks, lanes=2, batch=2, targets=1, seed=0, free_share=1.0)
    chunks = imagine(model, rollouts.draw(8), rollouts, torch.Generator())
    assert chunks.requires_grad
    assert calls[-1]
    assert not any(calls[:-1])


def test_the_error_of_pictures_is_absolute_and_reaches_the_imagined_chunk_alone():
    codec = Codec().requires_grad_(False)
    chunks = torch.randn(2, 16, CHUNK_LATENTS, 4, 4, requires_grad=True)
    targets = torch.randn(2, 16, CHUNK_LATENTS, 4, 4, requires_grad=True)
    error = picture_error(codec, chunks, targets)
    error.backward()
    frames = [codec.decode(x.transpose(1, 2).flatten(0, 1)) for x in (chunks, targets)]
    torch.testing.assert_close(error, (frames[0] - frames[1]).abs().mean())
    assert chunks.grad.abs().max() > 0
    assert targets.grad is None
    assert picture_error(codec, chunks, chunks) == 0


def test_training_on_free_rollouts_runs_and_resumes(walks):
    torch.manual_seed(0)
    options = FreeOptions(lanes=2, anchors=1, free_context=(4, 8), anchor_context=(4, 8))
    trainer = FreeTrainer(TinyWorld(TINY), Codec(), options)
    before = trainer.average.head.weight.clone()
    saves = []
    trainer.run(walks, 1.5, lambda state: saves.append(state.step))
    assert trainer.step > 0
    assert saves == [trainer.step]
    assert not torch.equal(trainer.average.head.weight, before)
    again = FreeTrainer(TinyWorld(TINY), Codec(), options)
    again.load(trainer.state())
    again.run(walks, trainer.elapsed_s + 0.5, lambda state: None)
    assert again.step > trainer.step
    assert all(torch.isfinite(p).all() for p in again.model.parameters())
