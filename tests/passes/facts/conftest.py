"""Let a test find the attention of a function, at one length of the history or two."""

import pytest
from attending import HISTORY, TEXT, kv, latents

from lipass.passes.attention.site import sites


@pytest.fixture
def found(trace, apply):
    def run(fn, args, grown=None, text=TEXT):
        gm = trace(fn, args, grown)
        apply(gm, text)
        return [(site.role, site.reason) for _, site in sites(gm.graph)]

    return run


@pytest.fixture
def grown():
    """Decode inputs at two lengths of the history, so that the length is dynamic."""
    return tuple((latents(), kv(6), kv(16 * n)) for n in (HISTORY, HISTORY + 4))
