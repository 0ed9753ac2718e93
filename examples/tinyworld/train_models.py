"""The stages that train a model: which trainer, on what, and from which weights."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from .data import codec_at
from .learner import Learner, Pace, no_plan_for_each_length
from .model import TinyWorld
from .stream import StreamWorld
from .stream_walks import load_walks
from .train_progress import bar, log, write
from .train_recipes import finishing_phases, phases
from .train_rollouts import RolloutTrainer
from .train_sampler import SamplerTrainer
from .train_stream import StreamTrainer
from .train_unseen import UnseenTrainer
from .train_world import Trainer

if TYPE_CHECKING:
    from .train import Training

_FROM_NOTHING = Pace(2e-3, 150, average_share=1 / 4, average_steps=500)
_FINISHING = Pace(1.2e-3, 30, average_share=1 / 4, average_steps=200)
_CURVE_POINTS = 200


def _world(training: "Training", model: TinyWorld) -> tuple[Learner, Callable[..., None]]:
    pixels, batch = training.recipe.pixels, training.sizes.batch
    fine = partial(training.walks, pixels)
    if training.init:
        curriculum = finishing_phases(fine, batch)
    else:
        curriculum = phases(partial(training.walks, pixels // 2), fine, batch)
    trainer = Trainer(model, _FINISHING if training.init else _FROM_NOTHING)
    return trainer, partial(trainer.run, curriculum)


def _unseen(training: "Training", model: TinyWorld) -> tuple[Learner, Callable[..., None]]:
    codec = codec_at(training.out / "codec.safetensors")
    unseen = UnseenTrainer(model, codec, training.sizes.unseen)
    return unseen, partial(unseen.run, training.walks(training.recipe.pixels))


def _rollouts(training: "Training", model: TinyWorld) -> tuple[Learner, Callable[..., None]]:
    codec = codec_at(training.out / "codec.safetensors")
    rollouts = RolloutTrainer(model, codec, training.sizes.rollouts)
    return rollouts, partial(rollouts.run, training.walks(training.recipe.pixels))


def _stream(training: "Training", model: TinyWorld) -> tuple[Learner, Callable[..., None]]:
    assert isinstance(model, StreamWorld)
    stream = StreamTrainer(model, training.sizes.stream)
    return stream, partial(stream.run, load_walks(training.out / "walks"))


def _sampler(training: "Training", model: TinyWorld) -> tuple[Learner, Callable[..., None]]:
    sampler = SamplerTrainer(model, training.sizes.sampler)
    return sampler, partial(sampler.run, training.walks(training.recipe.pixels))


TRAINERS = {
    "world": _world, "unseen": _unseen, "rollouts": _rollouts, "stream": _stream,
    "sampler": _sampler,
}  # fmt: skip


def learn(rank: int, training: "Training", stage: str, seconds: float) -> None:
    """Run a stage that trains the model, as one of the processes that do."""
    torch.manual_seed(0)
    model = (StreamWorld if stage == "stream" else TinyWorld)(training.recipe.config)
    if begin := training.latest(stage):
        model.load_state_dict(load_file(begin))
    trainer, run = TRAINERS[stage](training, model.to(training.device))
    checkpoint = training.out / f"{stage}.checkpoint"
    if checkpoint.exists():
        # Optimizers move what belongs on the device; AdamW's count of steps would be read there.
        trainer.load(torch.load(checkpoint, map_location="cpu"))
        log(f"{stage}: goes on from step {trainer.step}, {trainer.elapsed_s:.0f} s")

    def save(state: Learner) -> None:
        if rank:
            return
        state.save(checkpoint, training.out / f"{stage}-average.safetensors")
        recent = zip(*(row[1:] for row in state.losses[-100:]), strict=True)
        told = ", ".join(f"{sum(losses) / len(losses):.4f}" for losses in recent)
        bar(stage, state.elapsed_s / seconds, f"step {state.step}, loss {told}")
        curve = state.losses[:: max(1, len(state.losses) // _CURVE_POINTS)]
        rounded = [[round(number, 4) for number in row] for row in curve]
        write(training.out / f"{stage}-curve.json", {"steps": state.step, "loss": rounded})

    if trainer.elapsed_s < seconds:
        with no_plan_for_each_length(training.device):
            run(seconds, save, checkpoint_s=min(120.0, seconds / 5))
    elif not rank and not (training.out / f"{stage}-average.safetensors").exists():
        save(trainer)
