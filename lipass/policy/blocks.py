"""Decide in which chunks and steps attention stays dense."""

from __future__ import annotations

from lipass.config import Config
from lipass.options import SparseOptions


def dense_chunk(options: SparseOptions | None, history_chunks: int) -> str | None:
    """Say why a whole chunk stays dense, or None.

    Args:
        options: None keeps everything dense anyway.
        history_chunks: chunks before the one that is generated.
    """
    if options is None:
        return None
    if history_chunks < options.dense_chunks:
        return f"history of {history_chunks} chunks < sparse.dense_chunks {options.dense_chunks}"
    return None


def short_context(options: SparseOptions | None, latents: int, latent_tokens: int) -> str | None:
    """Say why attention over a context that poses have chosen stays dense, or None.

    Args:
        options: None keeps everything dense anyway.
        latents: of the context.
        latent_tokens: tokens of one latent, which a graph or a call shows.
    """
    tokens = latents * latent_tokens
    if options is None or tokens > options.dense_tokens:
        return None
    limit = options.dense_tokens
    return f"context of {latents} latents, {tokens} tokens <= sparse.dense_tokens {limit}"


def early_step(options: SparseOptions | None, step: int) -> str | None:
    """Say why a denoising step stays dense, or None.

    Args:
        options: None keeps everything dense anyway.
        step: its number, from 0.
    """
    if options is None or step >= options.dense_steps:
        return None
    return f"denoising step {step} < sparse.dense_steps {options.dense_steps}"


def roles_that_stay_sparse(config: Config) -> tuple[str, ...]:
    """Return the roles of attention for which a dense chunk is none.

    Attention among all frames (`self`) reads no history, so a short one says nothing about it. In
    mode "matrix-game" the memory is part of what it reads, and the release is dense without.
    """
    modes = {one.mode for one in (config.context, config.steps) if one is not None}
    return () if "matrix-game" in modes else ("self",)
