"""Keep what each file imports of checkouts to itself: several have packages of one name."""

import sys

import pytest

from lipass.adapters.checkouts import imports

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
    """Drop modules of checkouts, and the empty ones that stood in for what they import.

    Dynamo's names for them too: it keeps them in the globals of the frame that it traces, and
    would guard on a module of the same name that is gone.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OF_CHECKOUTS or isinstance(module, imports._Empty):
            del sys.modules[name]
    aliases = tuple(f"__import_{root}" for root in _OF_CHECKOUTS)
    for module in list(sys.modules.values()):
        for name in [n for n in getattr(module, "__dict__", ()) if n.startswith(aliases)]:
            delattr(module, name)
