"""What trains on a GPU, on a device without values: no tensor of the host meets one of it."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lipass.examples.tinyworld import recogniser, train_codec, train_models
from lipass.examples.tinyworld.catalogue import NAMES
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.data import VIEWS, draw, shown
from lipass.examples.tinyworld.learner import (
    Learner,
    Pace,
    no_plan_for_each_length,
    normal,
    products_in_tf32,
    uniform,
)
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.own_rollouts import OwnRollouts
from lipass.examples.tinyworld.rollout import roll_out
from lipass.examples.tinyworld.scenario import make_scenario
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_scores import way_back
from lipass.examples.tinyworld.stream_walks import LongWalk
from lipass.examples.tinyworld.train import Training
from lipass.examples.tinyworld.train_batches import LatentWalks, Sampler
from lipass.examples.tinyworld.train_recipes import RECIPES
from lipass.examples.tinyworld.train_rollouts import RolloutOptions, RolloutTrainer
from lipass.examples.tinyworld.train_sampler import SamplerOptions, SamplerTrainer
from lipass.examples.tinyworld.train_stream import (
    StreamOptions,
    StreamTrainer,
    Stretch,
    stream_loss,
)
from lipass.examples.tinyworld.train_unseen import UnseenOptions, UnseenTrainer
from lipass.examples.tinyworld.train_world import Phase, Trainer, faster_dtype, prefill
from lipass.examples.tinyworld.world import Attributes, make_room, render

FRAMES, META = 20, torch.device("meta")
TINY = ModelConfig(rows=4, columns=4, width=32, heads=1, blocks=1, mlp_ratio=1, text_width=8)
_MAY_MEET = {"_to_copy", "copy_", "index"}


class OneDevice(TorchDispatchMode):
    """Refuses calls to which tensors of two devices go, as a GPU does; some pass on meta."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim
        ]
        met = {x.device.type for x in tensors}
        name = func.overloadpacket.__name__
        assert len(met) < 2 or name in _MAY_MEET, f"{func} got tensors of {sorted(met)}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def walks() -> LatentWalks:
    latents = torch.randn(3, 2, FRAMES, 16, 4, 4).half()
    w2c = torch.eye(4).repeat(3, FRAMES, 1, 1)
    tokens = torch.zeros(3, 2, 32, dtype=torch.long)
    similarity = torch.eye(FRAMES).repeat(3, 1, 1)
    return LatentWalks(latents, w2c, tokens, similarity, torch.randn(3, FRAMES, 16, 4, 4).half())


@pytest.fixture
def gpu(monkeypatch):
    """The device: its losses are left where they are, own chunks are taken as zeros."""
    monkeypatch.setattr(Learner, "settle", lambda self: None)
    append = OwnRollouts.append
    monkeypatch.setattr(
        OwnRollouts, "append", lambda self, chunks: append(self, torch.zeros(chunks.shape))
    )
    with OneDevice():
        yield META


def test_a_tensor_of_the_host_is_refused(gpu):
    with pytest.raises(AssertionError, match="got tensors of"):
        torch.zeros(2, 2, device=gpu) @ torch.zeros(2, 2)


@pytest.mark.parametrize("share_own", [0.0, 1.0])
def test_worlds_are_trained_where_the_model_is(share_own, walks, gpu):
    phases = [Phase(2.0, lambda: walks, 2, 2, (4, 8), share_own)]
    trainer = Trainer(TinyWorld(TINY).to(gpu), Pace(1e-3, 1, 1 / 4, 10))
    trainer.run(phases, 0.1, lambda state: None)
    assert trainer.step > 0
    assert trainer.losses[0][1].device == gpu
    assert all(p.device == gpu for p in trainer.average.parameters())


def test_a_memory_whose_prompt_changes_is_encoded_where_the_model_is(walks, gpu):
    sampler = Sampler(walks, batch=2, targets=1, seed=0)
    batch = next(b for b in (sampler.draw(8) for _ in range(200)) if 0 < b.changed_at < 8)
    made = prefill(TinyWorld(TINY).to(gpu), batch.to(gpu), torch.Generator())
    assert made.history[0][0].shape[2] == 8 * 16


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (RolloutTrainer, RolloutOptions(lanes=2, context=(4, 8), anchors=1, anchor_context=(4,))),
        (UnseenTrainer, UnseenOptions(contexts=2, anchors=1, anchor_context=(4, 8))),
    ],
)
def test_pictures_are_trained_where_the_model_is(trainer, options, walks, gpu):
    made = trainer(TinyWorld(TINY).to(gpu), Codec(), options)
    made.run(walks, 0.1, lambda state: None)
    assert made.step > 0
    assert made.losses[0][1].device == gpu


def test_samplers_are_trained_where_the_model_is(walks, gpu):
    options = SamplerOptions(contexts=2, targets=2, anchors=1, anchor_context=(8,))
    made = SamplerTrainer(TinyWorld(TINY).to(gpu), options)
    made.run(walks, 0.1, lambda state: None)
    assert made.step > 0
    assert made.losses[0][1].device == gpu


def test_streams_are_trained_where_the_model_is(gpu):
    latents, w2c = torch.randn(24, 16, 4, 4).half(), torch.eye(4).repeat(24, 1, 1)
    walk = LongWalk(latents, latents, w2c, tokenize("a room"))
    options = StreamOptions(batch=2, chunks=(3,), targets=2, own_from=-1.0, own_chunks=(4,))
    trainer = StreamTrainer(StreamWorld(TINY).to(gpu), options)
    trainer.run([walk], 0.1, lambda state: None)
    assert trainer.step > 0
    assert trainer.pool[0].history.device == gpu


class Copies(TorchFunctionMode):
    """Counts what goes from the host to a device, which it is waited for: numbers and lists."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            self.count += any(isinstance(x, list) for x in tree_leaves(args[1], is_list))
        elif isinstance(made, torch.Tensor) and made.device == META:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.count += func is torch.tensor or any(x.device.type == "cpu" for x in tensors)
        return made


def is_list(index) -> bool:
    return isinstance(index, list)


@pytest.mark.parametrize("chunks", [2, 6])
def test_few_constants_of_a_stream_are_copied_whatever_its_length(chunks):
    model = StreamWorld(dataclasses.replace(TINY, blocks=3)).to(META)
    latents = torch.zeros(1, 16, 4 * chunks, 4, 4, device=META)
    w2c = torch.zeros(1, 4 * chunks, 4, 4, device=META)
    stretch = Stretch(
        latents, latents, w2c, torch.zeros(1, 32, dtype=torch.long, device=META), latents, chunks,
        torch.zeros(1, 32, dtype=torch.long, device=META),
    )  # fmt: skip
    with Copies() as copies:
        stream_loss(model, stretch, list(range(1, chunks)), torch.Generator())
    drawn = 5  # levels and noise, which a GPU draws itself
    assert copies.count - drawn <= 2
    with Copies() as copies:
        text = model.text(stretch.tokens)
        model(latents[:, :, :4], torch.zeros(1, 4, device=META), w2c[:, :4], text)
    assert copies.count <= 2


def test_a_device_is_not_waited_for_between_checkpoints(walks):
    """A loss is a tensor until somebody asks."""
    phases = [Phase(2.0, lambda: walks, 2, 2, (4,), share_own=0.0)]
    trainer, seen = Trainer(TinyWorld(TINY), Pace(1e-3, 1, 1 / 4, 10)), []
    settle = trainer.settle
    trainer.settle = lambda: (seen.append(type(trainer.losses[-1][1])), settle())
    trainer.run(phases, 0.3, lambda state: None)
    assert seen == [torch.Tensor]
    assert all(isinstance(number, float) for row in trainer.losses for number in row)


def test_bf16_is_taken_where_there_is_no_choice(walks):
    batch = Sampler(walks, batch=1, targets=1, seed=0).draw(4).to(META)
    assert batch.context.device == batch.tokens.device == META
    assert faster_dtype(TinyWorld(TINY), batch) is torch.bfloat16


def test_noise_is_drawn_where_the_generator_is_and_used_where_it_is_asked_for():
    generator = torch.Generator().manual_seed(3)
    again = torch.Generator().manual_seed(3)
    cpu = torch.device("cpu")
    assert torch.equal(normal((3,), generator, cpu), torch.randn(3, generator=again))
    assert torch.equal(uniform((3,), generator, cpu), torch.rand(3, generator=again))
    assert normal((2, 3), generator, META).device == META


def test_tensor_cores_are_left_to_training():
    before = torch.get_float32_matmul_precision()
    with products_in_tf32(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    with products_in_tf32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_cudnn_is_kept_out_of_attention_while_a_gpu_trains(tmp_path, monkeypatch):
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before, seen = enabled(), []

    def run(trainer, *_, **__):
        seen.append((trainer.device.type, enabled()))

    monkeypatch.setattr(Trainer, "run", run)
    recipe = dataclasses.replace(RECIPES["small"], config=TINY)
    for device in (META, torch.device("cpu")):
        training = Training(recipe, tmp_path, device, 1.0, 1, None)
        train_models.learn(0, training, "world", 1.0)
        assert enabled() == before
    assert before
    assert seen == [("meta", False), ("cpu", True)]


def test_cudnn_that_was_off_stays_off():
    cuda = torch.backends.cuda
    cuda.enable_cudnn_sdp(False)
    try:
        with no_plan_for_each_length(torch.device("cpu")):
            assert not cuda.cudnn_sdp_enabled()
        assert not cuda.cudnn_sdp_enabled()
    finally:
        cuda.enable_cudnn_sdp(True)


def test_codec_is_trained_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(train_codec, "measure", lambda codec, frames: 0.0)
    monkeypatch.setattr(train_codec.torch, "save", lambda value, path: path.touch())
    codec, frames, said = Codec().to(META), torch.zeros(4, 3, 16, 16, dtype=torch.uint8), []
    for train in (train_codec.train_codec, train_codec.refine_decoder):
        checkpoint = tmp_path / train.__name__
        train(codec, frames, frames, 0.2, checkpoint, lambda *told: said.append(told))
    assert len(said) == 2
    assert codec.latent_mean.device == META


def test_views_are_rendered_where_the_cameras_are(gpu):
    room, w2c = make_room(3), torch.eye(4).repeat(20, 1, 1)
    (made,) = render(room, w2c.to(gpu), [Attributes()], 16)
    assert made.device == gpu
    assert made.shape == (20, 3, 16, 16)
    views = shown(draw(0), 16, gpu, every=8)
    assert views.shape == (VIEWS, 6, 3, 16, 16)


def test_views_that_are_rendered_together_are_those_of_one_after_the_other(monkeypatch):
    room, w2c = make_room(3), torch.eye(4).repeat(5, 1, 1)
    w2c[:, :3, 3] = -torch.tensor([2.0, -1.5, 2.0]) + 0.1 * torch.arange(5)[:, None]
    alone = render(room, w2c, [Attributes(), Attributes("night", "fog", "cool")], 16)
    monkeypatch.setattr("lipass.examples.tinyworld.world._VIEWS_AT_ONCE", {"cpu": 3})
    together = render(room, w2c, [Attributes(), Attributes("night", "fog", "cool")], 16)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_rollouts_are_made_where_the_weights_are(gpu):
    model, codec = TinyWorld(TINY).to(gpu), Codec().to(gpu)
    scenario = make_scenario("loop", "free", 9001, codec, pixels=32)
    assert scenario.w2c.device.type == "cpu"
    assert scenario.walls.device == scenario.truth.device == gpu
    text, some = model.text(tokenize("a room")[None].to(gpu)), slice(12)
    walls = scenario.walls[some]
    made = roll_out(model, text, scenario.given, scenario.w2c[some], walls, seed=1)
    assert made.latents.device == gpu
    assert made.latents.shape == (12, 16, 4, 4)


def test_a_recogniser_is_trained_where_the_codec_is(gpu, tmp_path, monkeypatch):
    made = []

    def keep(frames, shown, steps):
        made.append(train_recogniser(frames, shown, steps))
        return recogniser.Recogniser()

    train_recogniser = recogniser.train
    monkeypatch.setattr(recogniser, "train", keep)
    frames, named = torch.rand(4, 3, 64, 64), torch.zeros(4, len(NAMES))
    monkeypatch.setattr(recogniser, "examples", lambda *_: (frames, frames, named))
    monkeypatch.setattr(recogniser, "_STEPS_A_ROOM", 2)
    given = recogniser.recogniser_at(tmp_path / "recogniser", Codec().to(gpu), rooms=1)
    assert {p.device for p in made[0].parameters()} == {gpu}
    assert {p.device.type for p in given.parameters()} == {"cpu"}


def test_streams_are_scored_where_the_weights_are(gpu):
    config = ModelConfig(width=32, heads=1, blocks=1, mlp_ratio=1, text_width=8)
    with patch("lipass.examples.tinyworld.stream_scores.psnr_db", lambda x, y: 0.0):
        _, made, truth = way_back(StreamWorld(config).to(gpu), Codec().to(gpu), 9001, 4)
    assert made.device == truth.device == gpu
