"""Ask `torch.distributed` who takes part, and gather what each has."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lipass.errors import LipassError

Group = Any
"""A `torch.distributed.ProcessGroup`, or None for all processes."""


def ranks_of(group: Group) -> tuple[int, int]:
    """Return the rank of this process in a group, and how many ranks it has.

    Raises:
        LipassError: `torch.distributed` has not begun, or this process is in no such group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise LipassError(
            "ranks must be joined before they share work, got none; call "
            "torch.distributed.init_process_group first, as torchrun scripts do"
        )
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise LipassError(
            f"a process must be in the group whose work it shares, got one of rank "
            f"{dist.get_rank()} outside of it; pass the group that it is in"
        )
    return rank, count


def gathered(part: Tensor, count: int, group: Group) -> Tensor:
    """Return the tensors of one shape that `count` ranks have, `[count, ...]`, by rank."""
    part = part.contiguous()
    flat = torch.empty((count * part.numel(),), dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(flat, part.view(-1), group=group)
    return flat.view(count, *part.shape)
