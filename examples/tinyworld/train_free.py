"""Train what the model imagines: free rollouts, compared with the recording as pictures.

The velocity loss asks for the mean of all that may follow: where an edge may lie in several places
that is a ramp, and a rollout that goes on from ramps ends in a blur. Here the last prediction of
the sampler, in rollouts of which one chunk was recorded, is decoded and its absolute error taken.
That asks for the median, in which an edge at an unknown place is still an edge. Recorded contexts
keep the velocity loss, so that what memory determines stays as it was.

`python -m lipass.examples.tinyworld.train_free --init WEIGHTS` resumes where it stopped; it needs
the rooms and latents that `train` leaves in `build/tinyworld`.
"""

import argparse
import copy
import itertools
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .codec import Codec
from .data import load_recordings
from .learner import Learner, Pace, working_copy
from .model import TinyWorld
from .own_rollouts import OwnRollouts
from .train import ROOMS
from .train_batches import Batch, LatentWalks, Sampler, latent_walks
from .train_world import faster_dtype, prefill, velocity_loss
from .weights import load


@dataclass(frozen=True)
class FreeOptions:
    """Sizes and rates of the stage.

    A step advances `lanes` free rollouts by a chunk, on up to `free_context` latents, and draws
    `anchors` recorded contexts of `anchor_context` latents with `targets` chunks each. A rollout
    ends after `free_chunks`. `picture_weight` weighs the absolute error of frames in 0..1 against
    the velocity loss. The rate falls linearly from `peak_rate`; weights are averaged over about
    `average_steps`.
    """

    lanes: int = 10
    anchors: int = 2
    targets: int = 3
    free_context: tuple[int, ...] = (4, 8, 8, 12)
    anchor_context: tuple[int, ...] = (4, 8, 8, 12, 20)
    free_chunks: int = 6
    picture_weight: float = 4.0
    peak_rate: float = 8e-4
    average_steps: int = 200


def imagine(
    model: TinyWorld, batch: Batch, rollouts: OwnRollouts, generator: torch.Generator
) -> Tensor:
    """Generate the next chunk `[B, C, 4, Y, X]` of lanes; its last step alone has a gradient."""
    with torch.no_grad():
        prefilled = prefill(model, batch, generator)
    x = rollouts.noise()
    for sigma, sigma_next in itertools.pairwise(rollouts.sigmas()):
        level = torch.full((len(x), x.shape[2]), sigma)
        with torch.set_grad_enabled(sigma_next == 0):
            velocity = prefilled.velocity(x, level, batch.w2c_targets[:, :1], prefilled.text)
            x = x + (sigma_next - sigma) * velocity
    return x


def picture_error(codec: Codec, chunks: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of the decoded frames of chunks `[B, C, 4, Y, X]`, in 0..1.

    `codec` may be of any precision and has no gradient itself.
    """

    def decode(latents: Tensor) -> Tensor:
        frames = latents.transpose(1, 2).flatten(0, 1)
        return codec.decode(frames.to(codec.latent_mean.dtype)).float()

    with torch.no_grad():
        recorded = decode(targets)
    return (decode(chunks) - recorded).abs().mean()


class FreeTrainer(Learner):
    """Runs the stage under a wall-clock budget; `losses` are those of pictures and velocity."""

    def __init__(
        self, model: TinyWorld, codec: Codec, options: FreeOptions = FreeOptions()
    ) -> None:
        pace = Pace(options.peak_rate, 30, 1 / 3, options.average_steps)
        super().__init__(model, pace)
        self.options = options
        self.codec = copy.deepcopy(codec).bfloat16().requires_grad_(False)

    def run(
        self,
        walks: LatentWalks,
        seconds: float,
        progress: Callable[["FreeTrainer"], None],
        checkpoint_s: float = 200,
    ) -> None:
        """Train until `seconds` of training time have passed over all runs."""
        options, seed = self.options, self.step
        self.generator.manual_seed(seed)
        anchors = {"batch": options.anchors, "targets": options.targets, "seed": seed}
        recorded = Sampler(walks, **anchors)
        rollouts = OwnRollouts(
            walks, lanes=4 * options.lanes, batch=options.lanes, targets=1, seed=seed,
            free_share=1.0, free_chunks=options.free_chunks,
        )  # fmt: skip
        example = Sampler(walks, **anchors).draw(options.anchor_context[0])
        working = working_copy(self.model, faster_dtype(self.model, example))
        saved = time.perf_counter()
        while self.elapsed_s < seconds:
            begin = time.perf_counter()
            draw = random.Random(self.step)
            self.refresh(working)
            picture = self._free_step(working, rollouts, draw.choice(options.free_context))
            batch = recorded.draw(draw.choice(options.anchor_context))
            prefilled = prefill(working, batch, self.generator)
            velocity = velocity_loss(prefilled, batch, self.generator)
            velocity.backward()
            self.take_gradient(working)
            self.update(1 - self.elapsed_s / seconds)
            self.elapsed_s += time.perf_counter() - begin
            self.losses.append((self.elapsed_s, picture, float(velocity.detach())))
            if time.perf_counter() - saved > checkpoint_s or self.elapsed_s >= seconds:
                saved = time.perf_counter()
                progress(self)

    def _free_step(self, working: TinyWorld, rollouts: OwnRollouts, context_latents: int) -> float:
        """Advance free rollouts and leave their gradient in `working`; returns the error."""
        batch = rollouts.draw(context_latents)
        chunks = imagine(working, batch, rollouts, self.generator)
        rollouts.append(chunks.detach())
        error = picture_error(self.codec, chunks, batch.targets[:, 0].transpose(1, 2))
        (self.options.picture_weight * error).backward()
        return float(error.detach())


def main(argv: list[str] | None = None) -> None:
    """Run or resume the stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2300, help="training time in all")
    parser.add_argument("--init", type=Path, required=True, help="weights to start from")
    parser.add_argument("--out", type=Path, default=Path("build/tinyworld"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    _, codec = load()
    trainer = FreeTrainer(TinyWorld(), codec)
    for model in (trainer.model, trainer.average):
        model.load_state_dict(load_file(args.init))
    checkpoint = args.out / "free.checkpoint"
    if checkpoint.exists():
        trainer.load(torch.load(checkpoint))
    recordings = load_recordings(args.out / "rooms", range(ROOMS))
    walks = latent_walks(recordings, torch.load(args.out / "latents-full.pt"))

    def save(state: FreeTrainer) -> None:
        partial = checkpoint.with_suffix(".partial")
        torch.save(state.state(), partial)
        partial.rename(checkpoint)
        save_file(state.average.state_dict(), args.out / "free.safetensors")
        _, picture, velocity = (sum(x) / len(x) for x in zip(*state.losses[-100:], strict=True))
        print(
            f"step {state.step}, {state.elapsed_s:.0f} of {args.seconds:.0f} s, "
            f"pictures {picture:.4f}, velocity {velocity:.4f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    trainer.run(walks, args.seconds, save)


if __name__ == "__main__":
    main()
