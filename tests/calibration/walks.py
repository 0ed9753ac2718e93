"""A model of a few numbers and the loop around it, to be calibrated in a moment."""

import torch

from lipass.policy.trajectory import parse_trajectory

CHUNK_LATENTS = 4
SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


class Averaging(torch.nn.Module):
    """Draw new latents to the mean of what is read, and to a colour of their own."""

    def __init__(self):
        super().__init__()
        self.pull = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma, memory):
        """Velocity of latents `[T, C]` at a level, behind a memory `[M, C]`."""
        return (x - self.pull * memory.mean(0)) * (0.5 + sigma)


@torch.no_grad()
def roll_out(model, walk, session):
    """Latents `[N, C]`, which hang on the cameras through what is read."""
    noise = torch.Generator().manual_seed(0)
    history = torch.zeros(0, 8)
    for start in range(0, len(walk), CHUNK_LATENTS):
        past, query = walk[:start], walk[start : start + CHUNK_LATENTS]
        with session.chunk(
            poses=past if start else None, query=query, latents=history if start else None
        ) as chunk:
            memory = history[chunk.context] if start else torch.zeros(1, 8)
            x = torch.randn(len(query), 8, generator=noise)
            for step in chunk.steps(SIGMAS):
                x = x + (step.sigma_next - step.sigma) * model(x, step.sigma, memory)
        history = torch.cat([history, x])
    return history


def build():
    """What `lipass calibrate` asks for."""
    walks = {"way back": parse_trajectory("left-5, right-6"),
             "ahead": parse_trajectory("w-7")}  # fmt: skip
    return Averaging(), roll_out, walks, {"chunk_latents": CHUNK_LATENTS, "inner": "eager"}


def build_three():
    """The same without options."""
    return build()[:3]


def build_other():
    """What is not asked for."""
    return Averaging()
