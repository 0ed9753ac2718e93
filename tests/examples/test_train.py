"""Training: what a batch holds, how own rollouts go on, and that a few steps run and resume."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.learner import Pace, working_copy
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, TinyWorld
from lipass.examples.tinyworld.own_rollouts import OwnRollouts
from lipass.examples.tinyworld.rollout import joined
from lipass.examples.tinyworld.train_batches import CHANGE_SHARE, LatentWalks, Sampler
from lipass.examples.tinyworld.train_pictures import picture_error
from lipass.examples.tinyworld.train_rollouts import RolloutOptions, RolloutTrainer, imagine
from lipass.examples.tinyworld.train_sampler import (
    SamplerOptions,
    SamplerTrainer,
    levels,
    sampling_loss,
)
from lipass.examples.tinyworld.train_unseen import (
    UnseenOptions,
    UnseenSampler,
    UnseenTrainer,
    predict,
)
from lipass.examples.tinyworld.train_world import (
    Phase,
    Trainer,
    faster_dtype,
    prefill,
    velocity_loss,
)

FRAMES = 20
PACE = Pace(2e-3, 150, average_share=1 / 4, average_steps=500)
TINY = ModelConfig(rows=4, columns=4, width=32, heads=1, blocks=1, mlp_ratio=1, text_width=8)


@pytest.fixture
def walks() -> LatentWalks:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, FRAMES, 16, 4, 4, generator=generator).half()
    w2c = torch.eye(4).expand(3, FRAMES, 4, 4).contiguous()
    w2c[..., 0, 3] = torch.arange(FRAMES) * 0.1
    tokens = torch.zeros(3, 2, 32, dtype=torch.long)
    similarity = torch.eye(FRAMES).expand(3, -1, -1).contiguous()
    walls = torch.randn(3, FRAMES, 16, 4, 4, generator=generator).half()
    return LatentWalks(latents, w2c, tokens, similarity, walls)


def walls_of(walks: LatentWalks, latents: torch.Tensor) -> torch.Tensor:
    """Walls `[n, C, Y, X]` of the views that recorded `latents [n, C, Y, X]` are of."""
    recorded = walks.latents.float().flatten(3)
    found = []
    for latent in latents:
        walk, _, frame = (recorded == latent.flatten()).all(-1).nonzero()[0].tolist()
        found.append(walks.walls[walk, frame].float())
    return torch.stack(found)


def test_a_recorded_batch_has_its_context_outside_its_targets(walks):
    batch = Sampler(walks, batch=4, targets=1, seed=0).draw(8)
    assert batch.context.shape == (4, 8, 16, 4, 4)
    assert batch.targets.shape == (4, 1, CHUNK_LATENTS, 16, 4, 4)
    for context, target in zip(batch.context, batch.targets[:, 0], strict=True):
        assert not any(torch.equal(x, y) for x in context for y in target)


def variants(walks: LatentWalks, latents: torch.Tensor) -> list[int]:
    """Tell under which of the two prompts latents `[n, C, Y, X]` were recorded."""
    recorded = walks.latents.float().flatten(3)
    return [int((recorded == x.flatten()).all(-1).nonzero()[0, 1]) for x in latents]


def test_prompts_change_on_the_way_in_a_fixed_share_of_the_batches(walks):
    walks.tokens[:, 1] = 1
    sampler = Sampler(walks, batch=2, targets=1, seed=0)
    batches = [sampler.draw(8) for _ in range(200)]
    changed = [batch for batch in batches if batch.changed_at]
    assert len(changed) / 200 == pytest.approx(CHANGE_SHARE, abs=0.08)
    inside = [batch.changed_at for batch in changed if batch.changed_at < 8]
    assert 0.25 < len(inside) / len(changed) < 0.75
    assert len(set(inside)) > 3
    for batch in [*changed, *batches[:4]]:
        for row in range(2):
            target = int(batch.tokens[row, 0])
            earlier = int(batch.earlier_tokens[row, 0])
            assert earlier == 1 - target
            assert set(variants(walks, batch.targets[row, 0])) == {target}
            expected = [earlier] * batch.changed_at + [target] * (8 - batch.changed_at)
            assert variants(walks, batch.context[row]) == expected


def test_each_part_of_a_memory_is_encoded_with_the_prompt_that_it_was_made_under(walks):
    walks.tokens[:, 1] = 1
    torch.manual_seed(0)
    model = TinyWorld(TINY)
    sampler = Sampler(walks, batch=2, targets=1, seed=0)
    batch = next(b for b in (sampler.draw(8) for _ in range(200)) if 0 < b.changed_at < 8)
    batch.context_noise.zero_()
    made = prefill(model, batch, torch.Generator())
    parts = []
    for tokens, part in (
        (batch.earlier_tokens, slice(0, batch.changed_at)),
        (batch.tokens, slice(batch.changed_at, 8)),
    ):
        shown = batch.context[:, part].transpose(1, 2)
        w2c = torch.cat([batch.w2c_context[:, part], batch.w2c_targets[:, 0]], 1)
        walls = batch.walls_context[:, part].transpose(1, 2)
        level = torch.zeros(shown.shape[0], shown.shape[2])
        parts.append(model(shown, level, w2c, model.text(tokens), walls=walls))
    for pair, expected in zip(made.history, zip(*parts, strict=True), strict=True):
        for got, wanted in zip(pair, joined(expected), strict=True):
            torch.testing.assert_close(got, wanted)
    for pair, expected in zip(made.text, model.text(batch.tokens), strict=True):
        torch.testing.assert_close(pair, expected)


def test_half_of_the_recorded_samples_are_told_the_walls_of_their_views(walks):
    batch = Sampler(walks, batch=16, targets=2, seed=0).draw(8)
    told = [bool(walls.any()) for walls in batch.walls_context]
    assert 4 <= sum(told) <= 12
    for i, known in enumerate(told):
        expected = walls_of(walks, batch.context[i]) * known
        assert torch.equal(batch.walls_context[i], expected)
        for j in range(2):
            expected = walls_of(walks, batch.targets[i, j]) * known
            assert torch.equal(batch.walls_targets[i, j], expected)


def test_unseen_targets_lie_where_the_context_does_not_look(walks):
    sampler = UnseenSampler(walks, contexts=16, targets=2, seed=0)
    walks.similarity[:, :, : FRAMES // 2] = 1.0
    batch = sampler.draw(CHUNK_LATENTS)
    assert batch.context.shape == (16, CHUNK_LATENTS, 16, 4, 4)
    assert batch.targets.shape == (16, 2, CHUNK_LATENTS, 16, 4, 4)
    apart = set()
    unseen = 0
    for row in range(16):
        assert torch.equal(batch.walls_context[row], walls_of(walks, batch.context[row]))
        for target, walls in zip(batch.targets[row], batch.walls_targets[row], strict=True):
            assert torch.equal(walls, walls_of(walks, target))
            frames = [
                int((walks.latents.float() == x).flatten(3).all(-1).nonzero()[0, 2])
                for x in target
            ]
            apart |= set(torch.tensor(frames).diff().tolist())
            unseen += sum(frame >= FRAMES // 2 for frame in frames)
    assert apart == {1, 2, 4}
    assert unseen > 0.75 * batch.targets[:, :, :, 0, 0, 0].numel()


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
        walls = walks.walls[lane.walk].float() * lane.told
        assert torch.equal(batch.walls_targets[0, 1], walls[start : start + CHUNK_LATENTS])
        assert torch.equal(batch.walls_context[0], walls[start - CHUNK_LATENTS : start])
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
    trainer = Trainer(TinyWorld(TINY), PACE)
    trainer.run(phases, 2.0, lambda state: None)
    assert trainer.step > 0
    again = Trainer(TinyWorld(TINY), PACE)
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


def test_a_rollout_is_told_the_walls_if_it_is_free(walks):
    for free_share in (0.0, 1.0):
        rollouts = OwnRollouts(walks, lanes=4, batch=4, targets=1, seed=0, free_share=free_share)
        batch = rollouts.draw(CHUNK_LATENTS)
        assert batch.walls_targets.any() == batch.walls_context.any() == bool(free_share)


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


@pytest.mark.parametrize("last", [False, True])
def test_unseen_views_are_predicted_from_noise_and_at_the_last_level(last, walks):
    torch.manual_seed(0)
    model, levels = TinyWorld(TINY), []
    model.register_forward_pre_hook(lambda _, args: levels.append(float(args[1].flatten()[0])))
    batch = UnseenSampler(walks, contexts=2, targets=2, seed=0).draw(CHUNK_LATENTS)
    chunks = predict(model, batch, torch.Generator(), last=last)
    assert chunks.shape == (4, 16, CHUNK_LATENTS, 4, 4)
    assert chunks.requires_grad
    assert levels == pytest.approx([0.0, 1.0, 0.625] if last else [0.0, 1.0])


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (RolloutTrainer, RolloutOptions(lanes=2, context=(4, 8), anchors=1, anchor_context=(4,))),
        (UnseenTrainer, UnseenOptions(contexts=2, anchors=1, anchor_context=(4, 8))),
    ],
)
def test_training_on_pictures_runs_and_resumes(trainer, options, walks, tmp_path):
    torch.manual_seed(0)
    first = trainer(TinyWorld(TINY), Codec(), options)
    before = first.average.head.weight.clone()
    saves = []
    first.run(walks, 1.5, lambda state: saves.append(state.step))
    assert first.step > 0
    assert saves == [first.step]
    assert not torch.equal(first.average.head.weight, before)
    again = trainer(TinyWorld(TINY), Codec(), options)
    first.save(tmp_path / "checkpoint", tmp_path / "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "weights"]
    assert torch.equal(load_file(tmp_path / "weights")["head.weight"], first.average.head.weight)
    again.load(torch.load(tmp_path / "checkpoint"))
    again.run(walks, first.elapsed_s + 0.5, lambda state: None)
    assert again.step > first.step
    assert all(torch.isfinite(p).all() for p in again.model.parameters())
    assert again.model.embed_walls.weight.abs().max() > 0


def test_two_processes_average_their_gradients_and_numbers_stage_after_stage(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import argparse, pathlib, sys, torch\n"
        "from lipass.examples.tinyworld.ranks import average_over_ranks, rank_of, train_together\n"
        "def train(rank, args, offset):\n"
        "    assert rank_of() == (rank, 2)\n"
        "    gradients = [torch.full((2, 3), float(rank)), torch.full((4,), rank + offset)]\n"
        "    numbers = average_over_ranks(gradients, 2.0 * rank, 7.0)\n"
        "    means = [sorted(set(g.flatten().tolist())) for g in gradients]\n"
        "    (args.out / str(rank)).write_text(repr((means, numbers)))\n"
        "if __name__ == '__main__':\n"
        "    out = pathlib.Path(sys.argv[1])\n"
        "    for offset in (9.0, 10.0):\n"
        "        train_together(train, argparse.Namespace(processes=2, out=out), offset)\n"
    )
    subprocess.run([sys.executable, script, tmp_path], check=True, cwd=tmp_path)
    for rank in "01":
        assert (tmp_path / rank).read_text() == "([[0.5], [10.5]], [1.0, 7.0])"


def test_levels_of_noise_are_those_that_a_sampler_meets_and_many_are_all_noise():
    drawn = levels(4000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.min() == pytest.approx(0.3)
    assert drawn.max() == 1.0
    assert float((drawn == 1).float().mean()) == pytest.approx(0.15, abs=0.03)
    assert float((drawn > 0.8).float().mean()) > 0.5


def test_at_the_highest_noise_the_sampling_loss_asks_for_the_mean(walks, monkeypatch):
    """Of two chunks that may follow alike, what lies between costs less than either."""
    module = "lipass.examples.tinyworld.train_sampler"
    monkeypatch.setattr(f"{module}.levels", lambda count, *_: torch.ones(count))
    batch = UnseenSampler(walks, contexts=2, targets=2, seed=0).draw(CHUNK_LATENTS)
    batch.targets[:, 0], batch.targets[:, 1] = 1.0, -1.0

    class Says:
        text = None

        def __init__(self, clean: float) -> None:
            self.clean = clean

        def velocity(self, x, sigma, *_):
            return (x - self.clean) / sigma[:, None, :, None, None]

    def loss(clean: float) -> float:
        return float(sampling_loss(Says(clean), batch, torch.Generator().manual_seed(0)))

    assert loss(0.0) == pytest.approx(1.0, abs=1e-4)
    assert loss(1.0) == loss(-1.0) == pytest.approx(2.0, abs=1e-3)


def test_a_sampler_learns_and_goes_on_where_it_was(walks):
    torch.manual_seed(0)
    options = SamplerOptions(contexts=1, targets=2, context=(4,), anchors=1, anchor_context=(8,))
    trainer, saved = SamplerTrainer(TinyWorld(TINY), options), []
    trainer.run(walks, 0.5, lambda state: saved.append(state.state()), checkpoint_s=0.1)
    assert saved
    assert all(len(row) == 3 for row in trainer.losses)
    again = SamplerTrainer(TinyWorld(TINY), options)
    again.load(saved[-1])
    again.run(walks, again.elapsed_s + 0.2, lambda state: None)
    assert again.step > trainer.step
