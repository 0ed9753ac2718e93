"""Decide which share of the key blocks an attention call may visit, by role, layer and chunk."""

from __future__ import annotations

from dataclasses import dataclass

from lipass.options import SparseOptions

# Only attention over latents has a choice of blocks; text is short and always dense.
_BUDGETED_ROLES = ("prefill", "self", "decode")


@dataclass(frozen=True)
class BlockBudget:
    """Share of the freely chosen key blocks to visit.

    Attributes:
        share: in (0, 1]; 1 is dense.
        dense_reason: why it is dense by rule; None where the budget decides.
    """

    share: float
    dense_reason: str | None


def block_budget(
    options: SparseOptions | None, *, role: str, layer: int, history_chunks: int
) -> BlockBudget:
    """Give the budget of one attention call.

    Args:
        options: None keeps everything dense.
        role: "prefill", "self" or "decode"; other roles are dense.
        layer: attention layer, counted from 0 in call order.
        history_chunks: chunks before the one that is generated.
    """
    if options is None:
        return BlockBudget(1.0, "sparse attention is off")
    if role not in _BUDGETED_ROLES:
        return BlockBudget(1.0, f"role {role} has no latents to choose from")
    if layer in options.dense_layers:
        return BlockBudget(1.0, f"layer {layer} is in sparse.dense_layers")
    early = dense_chunk(options, history_chunks)
    if early is not None and role != "self":
        return BlockBudget(1.0, early)
    return BlockBudget(getattr(options, f"budget_{role}"), None)


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
