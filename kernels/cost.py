"""Predict whether sparse attention pays on this device: the gate in front of each call."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, KvLayout


def why_dense(q: Tensor, layout: KvLayout, q_grid: BlockGrid, visited_blocks: int) -> str:
    return ""
