"""open-oasis: frames one by one, each denoised behind a window of those before it.

What it hides from graphs, the length of a kept rotary table, is hidden by other models too, so
`lipass.adopt` needs nothing of its own here. Its loop is a script, which nothing can drive.
"""

from __future__ import annotations

from torch import nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.families import Family


def _adopt(model: nn.Module, adoption: Adoption) -> None:
    """Add nothing to what is done for any model."""


FAMILY = Family("open_oasis", ("dit.DiT",), _adopt, takes=("external_cond",))
