"""Let tables of rotary-embedding-torch be computed in the graph of a call.

Its modules keep the table that they made last, and read back how long it is, from a tensor or,
newer ones, an int: a cut in every layer, or a graph for each length.
"""

from __future__ import annotations

from torch import nn

from lipass.adapters.adoption import Adoption


def compute_tables(model: nn.Module, adoption: Adoption) -> None:
    """Switch off what rotary embeddings of a model keep; each call makes the same numbers."""
    why = "its table is computed, where the length of a kept one is read back"
    for part in model.modules():
        if adoption.hold(part, "cache_if_possible", why):
            continue
        keeps = hasattr(part, "cached_freqs_seq_len") and getattr(part, "cache_if_possible", False)
        if keeps and getattr(part, "freqs_for", "") != "pixel":  # of which none are kept
            adoption.rebind(part, "cache_if_possible", False, why)
