"""Register `lipass::sparse_attention`: pool, select and attend behind one operator.

One boundary a call site: a registered operator costs some 20 us a call on a CPU from Python.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define(
    "sparse_attention(Tensor q, Tensor[] k, Tensor[] v, SymInt[] q_grid, SymInt[] kv_grids, "
    "str roles, int[] tile, float budget, float scale, int sink_latents, str role, "
    "Tensor? keep_frames, str site) -> Tensor"
)


def _sparse_attention(
    q, k, v, q_grid, kv_grids, roles, tile, budget, scale, sink_latents, role, keep_frames, site
) -> Tensor:
    return F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=scale)


def _sparse_attention_fake(
    q, k, v, q_grid, kv_grids, roles, tile, budget, scale, sink_latents, role, keep_frames, site
) -> Tensor:
    return q.new_empty(q.shape)


_library.impl("sparse_attention", _sparse_attention, "CompositeExplicitAutograd")
torch.library.register_fake("lipass::sparse_attention", _sparse_attention_fake, lib=_library)
