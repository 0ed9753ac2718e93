"""Keep what each file imports of checkouts to itself: several have packages of one name."""

import sys

import pytest

from lipass.adapters.checkouts import imports
from lipass.testing.modules import forget_modules

_OF_CHECKOUTS = {
    "hyvideo", "wan", "pipeline", "utils", "attention", "dit", "rotary_embedding_torch",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_checkout():
    forget()
    path = list(sys.path)
    yield
    sys.path[:] = path
    forget()


def forget():
    """Drop modules of checkouts, and the empty ones that stood in for what they import."""
    stood_in = {name for name, one in sys.modules.items() if isinstance(one, imports._Empty)}
    forget_modules({*_OF_CHECKOUTS, *(name.partition(".")[0] for name in stood_in)})
