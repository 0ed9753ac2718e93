"""Training of the streaming model: its walks, its loss, and that a few steps run and resume."""

import random
from dataclasses import replace

import pytest
import torch

from lipass.examples.tinyworld.camera import invert
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, tokenize
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_walks import LongWalk, out_and_back, walk_with_loops
from lipass.examples.tinyworld.train_batches import CHANGE_SHARE
from lipass.examples.tinyworld.train_stream import (
    StreamOptions,
    StreamTrainer,
    Stretch,
    alike,
    in_time,
    stream_loss,
    stretch_of,
    there_and_back,
)
from lipass.examples.tinyworld.world import make_room

TINY = ModelConfig(rows=4, columns=4, width=32, heads=1, blocks=2, mlp_ratio=1, text_width=8)
OPTIONS = StreamOptions(batch=2, chunks=(3, 4), targets=2, own_chunks=(4,), own_every=1, pool=4)
CHUNKS = 6


@pytest.fixture
def walk() -> LongWalk:
    generator = torch.Generator().manual_seed(0)
    frames = CHUNKS * CHUNK_LATENTS
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 0, 3] = torch.arange(frames) * 0.1
    latents, walls = (torch.randn(frames, 16, 4, 4, generator=generator).half() for _ in "lw")
    return LongWalk(latents, walls, w2c, tokenize("a room"))


def tiny() -> StreamWorld:
    torch.manual_seed(0)
    model = StreamWorld(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def whole(walk: LongWalk, told: bool) -> Stretch:
    return stretch_of([walk], [list(range(len(walk.w2c)))], [told], torch.device("cpu"))


def test_a_walk_with_loops_stays_in_its_room_and_moves_as_people_do():
    room = make_room(5)
    walk = walk_with_loops(room, 96, torch.Generator().manual_seed(0), 0.12, 6.0)
    c2w = invert(walk)
    assert walk.shape == (96, 4, 4)
    for axis in (0, 2):
        assert (c2w[:, axis, 3] > 0).all()
        assert (c2w[:, axis, 3] < room.size_m[axis]).all()
    assert (c2w[1:, :3, 3] - c2w[:-1, :3, 3]).norm(dim=-1).max() < 0.13
    turned = (c2w[1:, :3, 2] * c2w[:-1, :3, 2]).sum(-1).clamp(-1, 1).arccos()
    # A wandering leg begins level, so that a tilt of up to 15 degrees may end at once.
    assert torch.rad2deg(turned).max() < 6.5 + 15


def test_the_way_back_sees_what_the_way_out_saw():
    path = out_and_back(make_room(9001), 64)
    assert torch.equal(path[32:], path[:32].flip(0))


def test_recorded_stretch_is_its_own_history_and_told_the_walls_or_zeros(walk):
    frames = [list(range(4, 16)), list(range(8, 20))]
    stretch = stretch_of([walk, walk], frames, [True, False], torch.device("cpu"))
    assert torch.equal(stretch.history, stretch.recorded)
    assert torch.equal(stretch.recorded[:, :, 0], walk.latents[[4, 8]].float())
    assert torch.equal(stretch.walls[0, :, 0], walk.walls[4].float())
    assert not stretch.walls[1].any()
    assert torch.equal(stretch.w2c[1], walk.w2c[8:20])


def test_chunks_in_front_of_a_change_are_those_of_the_other_prompt(walk):
    both = replace(walk, other_latents=-walk.latents, other_tokens=tokenize("a room at night"))
    frames = list(range(12))
    stretch = stretch_of([both], [frames], [True], torch.device("cpu"), changed_at=2)
    plain = whole(walk, True).recorded[:, :, :12]
    assert torch.equal(stretch.recorded[:, :, :8], -plain[:, :, :8])
    assert torch.equal(stretch.recorded[:, :, 8:], plain[:, :, 8:])
    assert torch.equal(stretch.tokens[0], walk.tokens)
    assert torch.equal(stretch.earlier_tokens[0], both.other_tokens)
    trainer, seen = StreamTrainer(tiny(), OPTIONS), []
    for seed in range(40):
        drawn = trainer.stretch([both], random.Random(seed), 4, in_time, [True], change=True)
        seen.append(drawn.changed_at)
    assert set(seen) == {1, 2, 3}
    assert trainer.stretch([both], random.Random(0), 4, in_time, [True]).changed_at == 0
    once = trainer.stretch([walk], random.Random(0), 4, in_time, [True], change=True)
    assert once.changed_at == 0


def test_a_fixed_share_of_the_stretches_changes_its_prompt(walk, monkeypatch):
    both = replace(walk, other_latents=walk.latents, other_tokens=walk.tokens)
    asked = []

    def stretch(self, walks, draw, chunks, kind, told, change):
        asked.append(change)
        return stretch_of([both], [list(range(12))], [True], torch.device("cpu"))

    monkeypatch.setattr(StreamTrainer, "stretch", stretch)
    monkeypatch.setattr(
        "lipass.examples.tinyworld.train_stream.stream_loss",
        lambda model, *_: model.head.weight.sum(),
    )
    monkeypatch.setattr(
        StreamTrainer, "update", lambda self, left: setattr(self, "step", self.step + 1)
    )
    trainer = StreamTrainer(tiny(), replace(OPTIONS, own_from=2.0))
    while trainer.step < 300:
        trainer.run([both], trainer.elapsed_s + 0.2, lambda state: None)
    assert sum(asked) / len(asked) == pytest.approx(CHANGE_SHARE, abs=0.08)


def test_loss_reads_history_before_the_target_alone_and_trains_its_keys(walk):
    model = tiny()

    def loss(latents: torch.Tensor, targets: list[int]) -> torch.Tensor:
        stretch = whole(walk, True)
        stretch.history = latents
        return stream_loss(model, stretch, targets, torch.Generator().manual_seed(1))

    history = whole(walk, True).history.requires_grad_()
    loss(history, [3, 1]).backward()
    read = history.grad.abs().amax((0, 1, 3, 4)).unflatten(0, (CHUNKS, CHUNK_LATENTS)).amax(1)
    assert (read[:3] > 0).all()
    assert (read[3:] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [in_time, there_and_back, alike])
def test_stretches_keep_chunks_together(walk, kind):
    for seed in range(8):
        chunks = torch.tensor(kind(walk, 4, random.Random(seed))).unflatten(0, (-1, CHUNK_LATENTS))
        assert len(chunks) == 4
        assert (chunks.diff(dim=1).abs() == 1).all()


def test_the_way_back_is_drawn_over_the_way_out(walk):
    frames = there_and_back(walk, 4, random.Random(0))
    assert frames[8:] == frames[:8][::-1]


def test_own_rollout_begins_with_the_recording_and_asks_for_it(walk):
    trainer = StreamTrainer(tiny(), OPTIONS)
    stretch = trainer.rollout([walk], random.Random(0))
    given = stretch.first_own * CHUNK_LATENTS
    assert 0 < given < stretch.recorded.shape[2]
    assert torch.equal(stretch.history[:, :, :given], stretch.recorded[:, :, :given])
    assert not torch.allclose(stretch.history[:, :, given:], stretch.recorded[:, :, given:])


def test_loss_and_rollouts_are_made_where_the_weights_are(walk):
    """Tensors on meta refuse to meet any that a function left on the CPU."""
    trainer = StreamTrainer(tiny().to("meta"), OPTIONS)
    stretch = trainer.rollout([walk], random.Random(0))
    assert stretch.history.device.type == "meta"
    assert stream_loss(trainer.model, stretch, [1, 3], trainer.generator).device.type == "meta"


def test_training_lowers_the_loss_and_goes_on_from_its_checkpoint(walk, tmp_path):
    checkpoint, weights = tmp_path / "stream.checkpoint", tmp_path / "stream.safetensors"
    trainer = StreamTrainer(tiny(), OPTIONS)
    stretch = whole(walk, False)

    def loss() -> float:
        draws = torch.Generator().manual_seed(1)
        return float(stream_loss(trainer.model, stretch, [2, 4], draws).detach())

    before, seen = loss(), []
    trainer.run([walk], 3.0, lambda state: seen.append(state.step))
    trainer.save(checkpoint, weights)
    assert loss() < before
    assert trainer.pool
    assert seen == [trainer.step]
    resumed = StreamTrainer(tiny(), OPTIONS)
    resumed.load(torch.load(checkpoint))
    resumed.run([walk], resumed.elapsed_s + 0.1, lambda state: None)
    assert resumed.step > trainer.step
