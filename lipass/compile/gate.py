"""Ask this machine for passes, which neither build nor time kernels."""

from __future__ import annotations

import torch

from lipass.kernels import pieces, prepare
from lipass.passes.graph.compat import undisturbed


def measured_gate(
    q_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, tokens: tuple[int, ...]
) -> str | None:
    """Say why keys in pieces should be joined; builds and times kernels where nobody has yet.

    Args:
        q_shape: `(B, H, Lq, D)` of the queries.
        dtype: of the call.
        device: of the call.
        tokens: of each piece of the keys.
    """
    with undisturbed():
        prepare()
        return pieces.why_joined(q_shape, dtype, device, tokens)
