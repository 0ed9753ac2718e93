"""Training by several processes with a thread each, which beats one process with several."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


class Together(Protocol):
    """How many train together, and the folder that all of them see."""

    @property
    def processes(self) -> int:
        """How many; one is this process."""

    @property
    def out(self) -> Path:
        """The folder."""


def train_together(train: Callable[..., None], args: Together, *rest) -> None:
    """Call `train(rank, args, *rest)` in `args.processes` processes; in this one if it is one.

    What they exchange is found through a file in the folder `args.out`.
    """
    if args.processes == 1:
        train(0, args, *rest)
    else:
        store = args.out / f"store-{os.getpid()}"
        # What an earlier stage has left there would be taken for the addresses of this one.
        store.unlink(missing_ok=True)
        mp.spawn(_join, (train, str(store), args, *rest), nprocs=args.processes)
        store.unlink(missing_ok=True)


def _join(rank: int, train: Callable[..., None], store: str, args, *rest) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store), rank=rank, world_size=args.processes
    )
    train(rank, args, *rest)
    # A group that is left to the end of the interpreter now and then aborts it.
    dist.barrier()
    dist.destroy_process_group()


def rank_of() -> tuple[int, int]:
    """Rank of this process and number of processes that train together."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def average_over_ranks(gradients: list[Tensor], *numbers: float | Tensor) -> list[Any]:
    """Average gradients and a few numbers over all processes, in one exchange.

    A process alone gets its numbers back as they are, and does not wait for tensors.
    """
    _, ranks = rank_of()
    if ranks == 1:
        return list(numbers)
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor(list(map(float, numbers)))])
    dist.all_reduce(flat)
    flat /= ranks
    means = flat.split([g.numel() for g in gradients] + [len(numbers)])
    for gradient, mean in zip(gradients, means, strict=False):
        gradient.copy_(mean.view_as(gradient))
    return flat[-len(numbers) :].tolist()
