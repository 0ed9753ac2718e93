"""Split attention over ranks by keys: each attends to those it holds, and all get the whole."""

from __future__ import annotations

from torch import Tensor

from lipass.kernels.block_sparse.reference import merge_partials
from lipass.parallel.ranks import Group, gathered, ranks_of


def merge_over_ranks(out: Tensor, lse: Tensor, *, group: Group = None) -> tuple[Tensor, Tensor]:
    """Join attention over the keys that ranks hold into attention over all of them.

    So a history may be longer than what one device holds. All ranks attend with the same queries,
    each to its own keys::

        out, lse = lipass.attend(q, segments, site="blocks.0", return_lse=True)
        out, lse = merge_over_ranks(out, lse)

    Args:
        out: what this rank's keys gave `[B, H, Lq, D]`; of no keys, zeros.
        lse: log-sum-exp of its scores `[B, H, Lq]`, base e; of no keys, `-inf`.
        group: the ranks that hold keys; all by default.

    Returns:
        Output in `out.dtype`, and log-sum-exp fp32; the same on all ranks.

    Raises:
        ValueError: shapes that do not fit together.
        LipassError: `torch.distributed` has not begun, or this process is not in the group.
    """
    if out.dim() != 4 or lse.shape != out.shape[:3]:
        raise ValueError(
            f"lse must have the shape of out [B, H, Lq, D] without D, got {tuple(lse.shape)} and "
            f"{tuple(out.shape)}; pass both as `return_lse=True` returns them"
        )
    _, count = ranks_of(group)
    if count == 1:
        return out, lse.float()
    outs, lses = gathered(out, count, group), gathered(lse.float(), count, group)
    return merge_partials(list(outs.unbind(0)), list(lses.unbind(0)))
