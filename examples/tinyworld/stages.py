"""TinyWorld as two stages: one denoises chunks along cameras, the other decodes them.

line = [Stage("denoise", Denoiser, {"room": 9001}), Stage("decode", Decoder)]
with lipass.Stages(line, apart=True) as stages:
for frames in stages.run(cameras):  # [4, 4, 4] a chunk, world to camera
...
"""

import torch
from torch import Tensor

import lipass

from .compare import Contender, options_of
from .model import CHUNK_LATENTS, tokenize
from .rollout import SIGMAS, chunk_noise, retrieve, run_chunk
from .scenario import make_scenario
from .train_batches import prompt_of
from .weights import load


class Denoiser:
    """Generate the latents of chunk after chunk behind a recorded walk.

    Args:
        room: seed of the room.
        preset: of the session and the graphs.
        inner: what compiles the graphs behind the passes; None leaves the model as it is.
        path: which walk is recorded; half of it is.
    """

    def __init__(
        self,
        room: int,
        preset: str = "all",
        inner: str | None = "inductor",
        path: str = "left/right",
    ) -> None:
        model, codec = load()
        recorded = make_scenario(path, "explored", room, codec)
        self.seed = room
        self.latents = recorded.given
        self.w2c = recorded.w2c[: len(recorded.given)]
        self.text = model.text(tokenize(prompt_of(recorded.attributes))[None])
        self.model = model if inner is None else Contender(preset, model, inner)
        self.session = lipass.Session(**options_of(preset, inner or "eager"))
        self.walk = 0

    def __call__(self, w2c: Tensor) -> Tensor:
        """Return latents `[4, C, Y, X]` of what cameras `[4, 4, 4]` see."""
        start, every = len(self.latents), torch.cat([self.w2c, w2c])
        shape = (1, self.latents.shape[1], CHUNK_LATENTS, *self.latents.shape[2:])
        with self.session.chunk(
            poses=self.w2c,
            query=w2c,
            latents=self.latents,
            own_context=retrieve(self.w2c, w2c),
            stream=f"walk {self.walk}",
        ) as chunk:
            _, x = run_chunk(
                self.model, self.text, list(self.latents), every, None, start,
                chunk_noise(self.seed, start, shape), chunk.context, chunk.steps(SIGMAS),
            )  # fmt: skip
        new = x[0].transpose(0, 1)
        self.latents, self.w2c = torch.cat([self.latents, new]), every
        return new

    def forget(self, count: int) -> None:
        """Go back to the chunks that were shown; a history that shrinks is another stream."""
        left = len(self.latents) - CHUNK_LATENTS * count
        self.latents, self.w2c = self.latents[:left], self.w2c[:left]
        self.session.forget(f"walk {self.walk}")
        self.walk += 1

    def close(self) -> None:
        """End the session."""
        self.session.close()


class Decoder:
    """Turn latents of chunks into frames."""

    def __init__(self) -> None:
        _, self.codec = load()

    def __call__(self, latents: Tensor) -> Tensor:
        """Return frames `[4, P, P, 3]` in bytes."""
        frames = self.codec.decode(latents)
        return (frames * 255 + 0.5).byte().permute(0, 2, 3, 1)
