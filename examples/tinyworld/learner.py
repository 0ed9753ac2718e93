"""What all trainings of the model share: optimizers, a moving average and a state to resume from.

Matrices are trained by Muon, the rest by AdamW; weights are kept in fp32 and used in whichever of
fp32 and bf16 this machine is faster in. Samples are drawn on the host and computed where the
weights are, which the host does not wait for: it draws the next ones meanwhile.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .model import TinyWorld
from .muon import Muon
from .ranks import average_over_ranks


@dataclass(frozen=True)
class Pace:
    """How fast a training learns, and over how many of its steps weights are averaged.

    The rate rises to `peak_rate` in `warm_up_steps` and falls with the time that is left. The
    average is over about the latest `average_share` of all steps, and at most `average_steps`.
    """

    peak_rate: float
    warm_up_steps: int
    average_share: float
    average_steps: int


def generator_for(device: torch.device) -> torch.Generator:
    """Make what draws noise for a device: there if it is a GPU, else on the host."""
    return torch.Generator("cuda" if device.type == "cuda" else "cpu")


def uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw numbers in 0..1 where the generator is, for `device`."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def normal(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw noise where the generator is, for `device`."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


@contextmanager
def products_in_tf32(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply fp32 on tensor cores; the renderer, which is exact, does not."""
    if device.type == "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def no_plan_for_each_length(device: torch.device) -> Iterator[None]:
    """Keep cuDNN out of attention: it plans anew for each length, and contexts have any."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and device.type == "cpu")
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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


def working_copy(model: TinyWorld, dtype: torch.dtype) -> TinyWorld:
    """Copy a model to compute in `dtype`; noise levels are embedded in fp32 as before."""
    working = copy.deepcopy(model).to(dtype)
    working.frequencies = model.frequencies
    return working


class Learner:
    """Model, moving average and optimizers; `losses` are rows of seconds and losses.

    It trains where the model is, and draws noise there if that is a GPU.
    """

    def __init__(self, model: TinyWorld, pace: Pace, seed: int = 0) -> None:
        self.model, self.pace = model, pace
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = optimizers(model)
        self.device = next(model.parameters()).device
        self.generator = generator_for(self.device).manual_seed(seed)
        self.step, self.elapsed_s = 0, 0.0
        self.losses: list[tuple[Any, ...]] = []

    def settle(self) -> None:
        """Read the losses of the steps so far; until then nobody waits for the device."""
        unread = len(self.losses)
        while unread and not all(isinstance(n, float) for n in self.losses[unread - 1]):
            unread -= 1
        self.losses[unread:] = [tuple(map(float, row)) for row in self.losses[unread:]]

    def state(self) -> dict:
        """Everything a resumed run needs but own rollouts, which begin anew."""
        self.settle()
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "losses": self.losses,
        }

    def save(self, checkpoint: Path, weights: Path) -> None:
        """Write the state to `checkpoint`, whole or not at all, and the average to `weights`."""
        partial = checkpoint.with_suffix(".partial")
        torch.save(self.state(), partial)
        partial.rename(checkpoint)
        partial = weights.with_suffix(".partial")
        save_file(self.average.state_dict(), partial)
        partial.rename(weights)

    def load(self, state: dict) -> None:
        """Resume from `state`."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.losses = state["losses"]

    def refresh(self, working: TinyWorld) -> None:
        """Copy the weights to the model that computes."""
        with torch.no_grad():
            torch._foreach_copy_(list(working.parameters()), list(self.model.parameters()))

    def take_gradient(self, working: TinyWorld) -> None:
        """Move the gradient from the model that computes to the weights."""
        for p, used in zip(self.model.parameters(), working.parameters(), strict=True):
            assert used.grad is not None
            p.grad, used.grad = used.grad.float(), None

    def learn(self, working: TinyWorld, began_s: float, seconds: float, *losses: Tensor) -> None:
        """Take a step by the gradient of the model that computes; note time and losses.

        Args:
            working: the model that computes.
            began_s: what `time.perf_counter()` was when no time had been spent.
            seconds: that may be spent.
            losses: of the step.
        """
        self.take_gradient(working)
        self.elapsed_s, *means = average_over_ranks(
            [p.grad for p in self.model.parameters() if p.grad is not None],
            time.perf_counter() - began_s,
            *(loss.detach() for loss in losses),
        )
        self.update(1 - self.elapsed_s / seconds)
        self.losses.append((self.elapsed_s, *means))

    def update(self, left: float) -> None:
        """Take one optimizer step with share `left` of the time remaining; average the weights."""
        pace = self.pace
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.step += 1
        rate = pace.peak_rate * min(1.0, self.step / pace.warm_up_steps) * max(0.02, left)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = 1 - 1 / min(pace.average_steps, 1 + self.step * pace.average_share)
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
