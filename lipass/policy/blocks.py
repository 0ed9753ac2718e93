"""Decide in which chunks attention stays dense."""

from __future__ import annotations

from lipass.config import Config
from lipass.options import SparseOptions


def dense_chunk(
    options: SparseOptions | None, history_chunks: int, context_latents: int | None = None
) -> str | None:
    """Say why a whole chunk stays dense, or None.

    Args:
        options: None keeps everything dense anyway.
        history_chunks: chunks before the one that is generated.
        context_latents: history latents that the model reads; None where nobody chose them.
    """
    if options is None:
        return None
    if history_chunks < options.dense_chunks:
        return f"history of {history_chunks} chunks < sparse.dense_chunks {options.dense_chunks}"
    if context_latents is not None and context_latents <= options.dense_latents:
        return (
            f"context of {context_latents} latents <= sparse.dense_latents {options.dense_latents}"
        )
    return None


def roles_that_stay_sparse(config: Config) -> tuple[str, ...]:
    """Return the roles of attention for which a dense chunk is none.

    Attention among all frames (`self`) reads no history, so a short one says nothing about it. In
    mode "matrix-game" the memory is part of what it reads, and the release is dense without.
    """
    modes = {one.mode for one in (config.context, config.steps) if one is not None}
    return () if "matrix-game" in modes else ("self",)
