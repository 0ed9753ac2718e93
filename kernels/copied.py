"""Copy a tensor into memory that no compiler fuses away."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lipass::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    """Return a copy of a tensor, with its strides where it is dense.

    `clone` may be computed where it is read, which is too late if its source is written first.
    """
    return x.clone()


@copied.register_fake
def _copied_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)
