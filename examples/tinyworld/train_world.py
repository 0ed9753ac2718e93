"""Train the world model on latents of recorded walks.

The model predicts clean latents; the squared error is weighted by 1/sigma^2, which is the velocity
loss. Several target chunks share one prefilled context, the context is noised, partly replaced by
the model's own earlier predictions (so that it learns to live on what it generates), and one
sample in ten changes its prompt between context and target (so that the prompt is not ignored).
Matrices are trained by Muon, the rest by AdamW; the first part of the time runs on 32x32 frames.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .camera import relative_to, view_similarity
from .model import CHUNK_LATENTS, Rotary, TinyWorld, tokenize
from .muon import Muon
from .world import Attributes

SIGMA_SHIFT = 5.0
SIGMA_MIN = 0.15
CONTEXT_NOISE = 0.15


@dataclass
class LatentWalks:
    """Latents of all recordings.

    `latents [R, 2, F, C, Y, X]` half precision (two prompts), `w2c [R, F, 4, 4]`,
    `tokens [R, 2, TEXT_TOKENS]`, `similarity [R, F, F]` of every pair of views.
    """

    latents: Tensor
    w2c: Tensor
    tokens: Tensor
    similarity: Tensor


def prompt_of(attributes: Attributes) -> str:
    """Write the prompt of a room's attributes."""
    return f"a room at {attributes.time} in {attributes.air} air in {attributes.palette} light"


def latent_walks(recordings: list, latents: Tensor) -> LatentWalks:
    """Collect what training samples from."""
    w2c = torch.stack([r.w2c for r in recordings])
    tokens = torch.stack(
        [torch.stack([tokenize(prompt_of(a)) for a in r.attributes]) for r in recordings]
    )
    similarity = torch.stack([view_similarity(w, w) for w in w2c])
    return LatentWalks(latents.half(), w2c, tokens, similarity)


@dataclass
class Batch:
    """`B` contexts with `J` target chunks each, all poses relative to the first target view."""

    context: Tensor
    targets: Tensor
    w2c_context: Tensor
    w2c_targets: Tensor
    tokens: Tensor
    target_tokens: Tensor
    own: list[tuple[int, int, int]]


class Sampler:
    """Draws training batches; remembers predictions to hand back as context."""

    def __init__(
        self, walks: LatentWalks, *, batch: int, targets: int, context_latents: int, seed: int
    ) -> None:
        self.walks = walks
        self.batch, self.targets, self.context_latents = batch, targets, context_latents
        self.generator = torch.Generator().manual_seed(seed)
        self.predicted: list[tuple[int, int, int, Tensor]] = []

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def remember(self, own: list[tuple[int, int, int]], clean: Tensor) -> None:
        """Keep first-target predictions `[B, 4, C, Y, X]` as context for a later draw."""
        for (walk, variant, start), latents in zip(own, clean, strict=True):
            if start + 2 * CHUNK_LATENTS <= self.walks.w2c.shape[1]:
                self.predicted.append((walk, variant, start, latents))
        self.predicted = self.predicted[-4 * self.batch :]

    def draw(self, share_own: float) -> Batch:
        """Draw a batch; `share_own` of the samples continue an own prediction where possible."""
        rows = [self._draw_one(share_own) for _ in range(self.batch)]
        return Batch(*(torch.stack(column) for column in list(zip(*rows, strict=True))[:-1]),
                     [row[-1] for row in rows])  # fmt: skip

    def _draw_one(self, share_own: float) -> tuple:
        walks, chunk, n = self.walks, CHUNK_LATENTS, self.context_latents
        frames = walks.w2c.shape[1]
        own = None
        if self.predicted and float(self._rand()) < share_own:
            pick = int(self._rand() * len(self.predicted))
            walk, variant, past, own = self.predicted.pop(pick)
            start = past + chunk
        else:
            walk, variant = int(self._rand() * len(walks.w2c)), int(self._rand() * 2)
            start = chunk + int(self._rand() * (frames - 2 * chunk + 1))
        similarity = walks.similarity[walk]
        recent = [i for i in range(start - chunk, start) if i >= 0]
        if own is None:
            recent = recent[int(self._rand() * 6) :] if float(self._rand()) < 0.3 else recent
        starts = [start]
        near = similarity[start : start + chunk].mean(0)
        for _ in range(self.targets - 1):
            weight = near[: frames - chunk + 1] + 0.05
            starts.append(int(torch.multinomial(weight, 1, generator=self.generator)))
        shown = sorted({i for s in starts for i in range(s, s + chunk)})
        score = similarity[shown].sort(0, descending=True).values[: 2 * chunk].mean(0)
        score = score + 0.35 * self._rand(frames) * float(self._rand())
        score[shown] = -10.0
        score[recent] = -20.0
        if float(self._rand()) < 0.5 and 0 not in shown and 0 not in recent:
            score[0] = 5.0
        chosen = sorted(recent + score.topk(n - len(recent)).indices.tolist())
        latents = walks.latents[walk, variant].float()
        context = latents[chosen].clone()
        if own is not None:
            for slot, frame in enumerate(chosen):
                if start - chunk <= frame < start:
                    context[slot] = own[frame - (start - chunk)]
        target_variant = 1 - variant if float(self._rand()) < 0.1 else variant
        target_latents = walks.latents[walk, target_variant].float()
        targets = torch.stack([target_latents[s : s + chunk] for s in starts])
        w2c = walks.w2c[walk]
        reference = w2c[start]
        cameras = torch.stack([relative_to(w2c[s : s + chunk], reference) for s in starts])
        return (
            context,
            targets,
            relative_to(w2c[chosen], reference),
            cameras,
            walks.tokens[walk, variant],
            walks.tokens[walk, target_variant],
            (walk, variant, start),
        )


def loss_and_prediction(
    model: TinyWorld, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Velocity loss of all targets, clean prediction `[B, 4, C, Y, X]` of the first."""
    b, j = batch.targets.shape[:2]
    noise_level = CONTEXT_NOISE * torch.rand(b, 1, generator=generator)
    noise_level = noise_level.expand(-1, batch.context.shape[1])
    context = batch.context + noise_level[..., None, None, None] * torch.randn(
        batch.context.shape, generator=generator
    )
    context = context.transpose(1, 2)
    text = model.text(batch.tokens)
    prefill_w2c = torch.cat([batch.w2c_context, batch.w2c_targets[:, 0]], 1)
    history = model(context, noise_level, prefill_w2c, text)
    targets = batch.targets.flatten(0, 1).transpose(1, 2)
    level = torch.rand(b * j, generator=generator)
    sigma = SIGMA_SHIFT * level / (1 + (SIGMA_SHIFT - 1) * level)
    sigma = sigma.clamp_min(SIGMA_MIN)[:, None].expand(-1, CHUNK_LATENTS)
    noise = torch.randn(targets.shape, generator=generator)
    s = sigma[:, None, :, None, None]
    noisy = (1 - s) * targets + s * noise
    repeat = [tuple(t.repeat_interleave(j, 0) for t in pair) for pair in history]
    target_text = model.text(batch.target_tokens)
    target_text = [tuple(t.repeat_interleave(j, 0) for t in pair) for pair in target_text]
    w2c = torch.cat(
        [batch.w2c_context.repeat_interleave(j, 0), batch.w2c_targets.flatten(0, 1)], 1
    )
    velocity = model(noisy, sigma, w2c, target_text, repeat)
    loss = (velocity - (noise - targets)).square().mean()
    clean = (noisy - s * velocity).detach().unflatten(0, (b, j))[:, 0].transpose(1, 2)
    return loss, clean


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; the schedule sets the rate."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name
        and "modulation" not in name
    ]  # fmt: skip
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=1.0),
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rank_of() -> tuple[int, int]:
    """Rank of this process and number of processes that train together."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def average_over_ranks(model: nn.Module, *numbers: float) -> list[float]:
    """Average gradients and a few numbers over all processes, in one exchange."""
    _, ranks = rank_of()
    if ranks == 1:
        return list(numbers)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= ranks
    means = flat.split([g.numel() for g in gradients] + [len(numbers)])
    for gradient, mean in zip(gradients, means, strict=False):
        gradient.copy_(mean.view_as(gradient))
    return flat[-len(numbers) :].tolist()


Walks = Callable[[], LatentWalks]


@dataclass
class Phase:
    """One stretch of training: until `until` (share of the time), on these walks."""

    until: float
    walks: Walks
    batch: int
    targets: int
    context_latents: int
    share_own: float


class Trainer:
    """Runs the phases under a wall-clock budget; its state can be saved and resumed."""

    def __init__(self, model: TinyWorld, seed: int = 0, peak_rate: float = 2e-3) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = optimizers(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.peak_rate = peak_rate
        self.step, self.elapsed_s = 0, 0.0
        self.losses: list[tuple[float, float]] = []

    def state(self) -> dict:
        """Everything a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "losses": self.losses,
        }

    def load(self, state: dict) -> None:
        """Resume from `state`."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.losses = state["losses"]

    def run(
        self, phases: list[Phase], seconds: float, progress, checkpoint_s: float = 120
    ) -> None:
        """Train until `seconds` of training time have passed over all runs."""
        rank, ranks = rank_of()
        self.generator.manual_seed(ranks * self.step + rank)
        begin = self.elapsed_s
        clock, saved = time.perf_counter(), time.perf_counter()
        phase, sampler = None, None
        while self.elapsed_s < seconds:
            done = self.elapsed_s / seconds
            current = next(p for p in phases if done < p.until)
            if current is not phase:
                phase = current
                walks = phase.walks()
                config = self.model.config
                self.model.rotary = Rotary(
                    *walks.latents.shape[-2:], config.width // config.heads // 2
                )
                clock, begin = time.perf_counter(), self.elapsed_s
                sampler = Sampler(
                    walks, batch=max(1, phase.batch // ranks), targets=phase.targets,
                    context_latents=phase.context_latents, seed=2 * self.step + rank,
                )  # fmt: skip
            rate = self.peak_rate * min(1.0, (self.step + 1) / 150) * max(0.02, 1 - done)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
            batch = sampler.draw(phase.share_own)
            loss, clean = loss_and_prediction(self.model, batch, self.generator)
            loss.backward()
            self.elapsed_s, mean_loss = average_over_ranks(
                self.model, begin + time.perf_counter() - clock, float(loss.detach())
            )
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            if phase.share_own:
                sampler.remember(batch.own, clean)
            self.step += 1
            decay = min(0.998, 1 - 1 / (1 + self.step / 4))
            with torch.no_grad():
                for mean, now in zip(
                    self.average.parameters(), self.model.parameters(), strict=True
                ):
                    mean.lerp_(now, 1 - decay)
            self.losses.append((self.elapsed_s, mean_loss))
            if time.perf_counter() - saved > checkpoint_s or self.elapsed_s >= seconds:
                saved = time.perf_counter()
                progress(self)
