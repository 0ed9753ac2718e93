"""Build a small Causal-Forcing from a checkout: its files are named as those of Self-Forcing."""

from __future__ import annotations

from pathlib import Path

from lipass.adapters.checkouts import self_forcing
from lipass.adapters.checkouts.subject import Subject


def build(checkout: Path) -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights."""
    return self_forcing.build(checkout, family="causal_forcing")
