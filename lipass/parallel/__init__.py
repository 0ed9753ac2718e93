"""Share the attention of one chunk among processes, which then decide alike."""

from __future__ import annotations

from lipass.parallel.heads import over_heads
from lipass.parallel.keys import merge_over_ranks

__all__ = ["merge_over_ranks", "over_heads"]
