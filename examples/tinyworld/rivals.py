"""The simplest ways to save the same time: the dense model in a loop that asks for less.

Each runs what `off` has compiled, with fewer noise levels or fewer history latents. A preset earns
its place where none of them is both as fast and as close to the dense pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .compare import Contender, Run, graphs_compiled
from .model import CHUNK_LATENTS, KeyValue
from .rollout import SIGMAS, retrieve, roll_out
from .scenario import Scenario

# Of lists of two levels the one that stays closest to four (`benchmarks.loop_choice`).
TWO_SIGMAS = (1.0, 0.625, 0.0)
ONE_SIGMA = (1.0, 0.0)


def retrieve_random(w2c: Tensor, query: Tensor, context: int) -> list[int]:
    """Pick the latest chunk and random latents before it; the same ones for the same history."""
    earlier = len(w2c) - CHUNK_LATENTS
    if len(w2c) <= context:
        return list(range(len(w2c)))
    generator = torch.Generator().manual_seed(len(w2c))
    drawn = torch.randperm(earlier, generator=generator)[: context - CHUNK_LATENTS]
    return sorted([*drawn.tolist(), *range(earlier, len(w2c))])


@dataclass
class Rival:
    """A loop around the dense model; takes part in `compare` like a contender.

    Attributes:
        preset: its name in tables.
        dense: whose compiled model it calls.
        sigmas: noise levels.
        retriever: its choice of context.
        compile_s: nothing of its own is compiled.
        recompiles: graphs that its own rollouts compiled all the same.
    """

    preset: str
    dense: Contender
    sigmas: Sequence[float] = SIGMAS
    retriever: Callable[[Tensor, Tensor], list[int]] = retrieve
    compile_s: float = 0.0
    recompiles: int = 0

    def roll_out(self, scenario: Scenario, text: list[KeyValue]) -> Run:
        """Roll out once."""
        graphs = graphs_compiled()
        rollout = roll_out(
            self.dense, text, scenario.given, scenario.w2c, scenario.walls,
            seed=scenario.room.seed, retriever=self.retriever, sigmas=self.sigmas,
        )  # fmt: skip
        self.recompiles += graphs_compiled() - graphs
        return Run(rollout, [], 1.0)


# Noise levels and choice of context, by name.
RIVALS = {
    "1 step": (ONE_SIGMA, retrieve),
    "1 step, 12 latents": (ONE_SIGMA, partial(retrieve, context=12, window=CHUNK_LATENTS)),
    "2 steps": (TWO_SIGMAS, retrieve),
    "2 steps, 12 latents": (TWO_SIGMAS, partial(retrieve, context=12, window=CHUNK_LATENTS)),
    "2 steps, 8 latents": (TWO_SIGMAS, partial(retrieve, context=8, window=CHUNK_LATENTS)),
    "2 steps, 8 random": (TWO_SIGMAS, partial(retrieve_random, context=8)),
}


def rivals(dense: Contender) -> list[Rival]:
    """Make all of them around one compiled model."""
    return [Rival(name, dense, *asked) for name, asked in RIVALS.items()]
