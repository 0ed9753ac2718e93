"""Train the world model on latents of recorded walks and on its own rollouts.

The model predicts clean latents; the squared error is weighted by 1/sigma^2, which is the velocity
loss. Several target chunks share one prefilled context.
"""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .learner import Learner, normal, uniform, working_copy
from .model import CHUNK_LATENTS, KeyValue, Rotary, TinyWorld
from .own_rollouts import OwnRollouts
from .ranks import rank_of
from .rollout import joined
from .train_batches import Batch, LatentWalks, Sampler

SIGMA_SHIFT = 5.0
SIGMA_MIN = 0.15


@dataclass
class Prefilled:
    """A model after the context of a batch: what is needed to denoise chunks behind it."""

    model: TinyWorld
    history: list[KeyValue]
    text: list[KeyValue]
    w2c_context: Tensor

    def velocity(
        self, x: Tensor, sigma: Tensor, w2c: Tensor, walls: Tensor, text: list[KeyValue]
    ) -> Tensor:
        """Predict for `x [B * J, C, 4, Y, X]`, `J` chunks a context.

        `w2c [B, J, 4, 4, 4]` and `walls [B, J, 4, C, Y, X]` are those of the chunks.
        """
        chunks = w2c.shape[1]

        def repeat(pairs: list[KeyValue]) -> list[KeyValue]:
            return [(k.repeat_interleave(chunks, 0), v.repeat_interleave(chunks, 0))
                    for k, v in pairs]  # fmt: skip

        cameras = torch.cat([self.w2c_context.repeat_interleave(chunks, 0), w2c.flatten(0, 1)], 1)
        dtype = self.history[0][0].dtype
        walls = walls.flatten(0, 1).transpose(1, 2).to(dtype)
        return self.model(
            x.to(dtype), sigma, cameras, repeat(text), repeat(self.history), walls
        ).float()


def prefill(model: TinyWorld, batch: Batch, generator: torch.Generator) -> Prefilled:
    """Run the context of a batch through the model, with noise of a level that it is told.

    Where the prompt changes in the context, each part is encoded by itself and with its own
    prompt, as a session's memory is.
    """
    b, n = batch.context.shape[:2]
    device = batch.context.device
    level = (batch.context_noise * uniform((b,), generator, device))[:, None].expand(-1, n)
    noise = normal(batch.context.shape, generator, device)
    context = batch.context + level[..., None, None, None] * noise
    text = model.text(batch.tokens)
    dtype = text[0][0].dtype
    parts = []
    for tokens, part in (
        (batch.earlier_tokens, slice(0, batch.changed_at)),
        (batch.tokens, slice(batch.changed_at, n)),
    ):
        if part.start == part.stop:
            continue
        w2c = torch.cat([batch.w2c_context[:, part], batch.w2c_targets[:, 0]], 1)
        walls = batch.walls_context[:, part].transpose(1, 2).to(dtype)
        said = text if tokens is batch.tokens else model.text(tokens)
        shown = context[:, part].transpose(1, 2).to(dtype)
        parts.append(model(shown, level[:, part], w2c, said, walls=walls))
    history = parts[0]
    if len(parts) > 1:
        history = [joined(pairs) for pairs in zip(*parts, strict=True)]
    return Prefilled(model, history, text, batch.w2c_context)


def velocity_loss(prefilled: Prefilled, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity of all targets at random noise levels."""
    b, j = batch.targets.shape[:2]
    targets = batch.targets.flatten(0, 1).transpose(1, 2)
    level = uniform((b * j,), generator, targets.device)
    sigma = SIGMA_SHIFT * level / (1 + (SIGMA_SHIFT - 1) * level)
    sigma = sigma.clamp_min(SIGMA_MIN)
    noise = normal(targets.shape, generator, targets.device)
    s = sigma[:, None, None, None, None]
    noisy = (1 - s) * targets + s * noise
    velocity = prefilled.velocity(
        noisy, sigma[:, None].expand(-1, CHUNK_LATENTS), batch.w2c_targets,
        batch.walls_targets, prefilled.text,
    )  # fmt: skip
    return (velocity - (noise - targets)).square().mean()


@torch.no_grad()
def continue_rollouts(prefilled: Prefilled, batch: Batch, rollouts: OwnRollouts) -> None:
    """Let the model generate the first target of a batch drawn from `rollouts`."""
    x = rollouts.noise().to(batch.context.device)
    for sigma, sigma_next in itertools.pairwise(rollouts.sigmas()):
        level = torch.full((len(x), CHUNK_LATENTS), sigma, device=x.device)
        velocity = prefilled.velocity(
            x, level, batch.w2c_targets[:, :1], batch.walls_targets[:, :1], prefilled.text
        )
        x = x + (sigma_next - sigma) * velocity
    rollouts.append(x)


def faster_dtype(model: TinyWorld, batch: Batch) -> torch.dtype:
    """Time a training step in fp32 and in bf16; CPUs differ by a factor of two either way.

    Processes that train together vote, so that none waits for another's slower choice. Of what is
    no CPU it is known: bf16.
    """
    if batch.context.device.type != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        working = working_copy(model, dtype)
        generator = torch.Generator().manual_seed(0)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            velocity_loss(prefill(working, batch, generator), batch, generator).backward()
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    votes = torch.tensor(float(seconds[torch.bfloat16] < seconds[torch.float32]))
    _, ranks = rank_of()
    if ranks > 1:
        dist.all_reduce(votes)
    return torch.bfloat16 if float(votes) > ranks / 2 else torch.float32


Walks = Callable[[], LatentWalks]


@dataclass
class Phase:
    """One stretch of training: until `until` (share of the time), on these walks.

    `context_latents` are drawn from per step; `share_own` of the steps continue own rollouts.
    """

    until: float
    walks: Walks
    batch: int
    targets: int
    context_latents: tuple[int, ...]
    share_own: float


class Trainer(Learner):
    """Runs the phases under a wall-clock budget; its state can be saved and resumed."""

    def run(
        self, phases: list[Phase], seconds: float, progress, checkpoint_s: float = 120
    ) -> None:
        """Train until `seconds` of training time have passed over all runs."""
        rank, ranks = rank_of()
        self.generator.manual_seed(ranks * self.step + rank)
        saved = time.perf_counter()
        phase = None
        while self.elapsed_s < seconds:
            current = next(p for p in phases if self.elapsed_s / seconds < p.until)
            if current is not phase:
                phase = current
                recorded, rollouts, working = self._enter(phase, ranks, rank)
                began_s = time.perf_counter() - self.elapsed_s
            # The same draw on all processes, which wait for each other.
            draw = random.Random(self.step)
            context_latents = draw.choice(phase.context_latents)
            source = rollouts if draw.random() < phase.share_own else recorded
            self.refresh(working)
            batch = source.draw(context_latents).to(self.device)
            prefilled = prefill(working, batch, self.generator)
            loss = velocity_loss(prefilled, batch, self.generator)
            loss.backward()
            if source is rollouts:
                continue_rollouts(prefilled, batch, rollouts)
            self.learn(working, began_s, seconds, loss)
            if time.perf_counter() - saved > checkpoint_s or self.elapsed_s >= seconds:
                saved = time.perf_counter()
                self.settle()
                progress(self)

    def _enter(
        self, phase: Phase, ranks: int, rank: int
    ) -> tuple[Sampler, OwnRollouts, TinyWorld]:
        walks = phase.walks()
        config = self.model.config
        grid = walks.latents.shape[-2:]
        rotary = Rotary(*grid, config.width // config.heads // 2)
        self.model.rotary = rotary.to(self.device)
        batch, seed = max(1, phase.batch // ranks), 2 * self.step + rank
        recorded = Sampler(walks, batch=batch, targets=phase.targets, seed=seed)
        rollouts = OwnRollouts(
            walks, lanes=4 * batch, batch=batch, targets=phase.targets, seed=seed
        )
        example = recorded.draw(phase.context_latents[0]).to(self.device)
        dtype = faster_dtype(self.model, example)
        return recorded, rollouts, working_copy(self.model, dtype)
