"""Forget modules between tests: several checkouts have packages of one name."""

from __future__ import annotations

import sys
from collections.abc import Collection


def forget_modules(roots: Collection[str]) -> None:
    """Drop modules of these packages, whoever imported them, and Dynamo's names for them.

    Dynamo keeps such names in the globals of the frame that it traces, and would guard on a module
    of the same name that is gone.
    """
    for name in list(sys.modules):
        if name.partition(".")[0] in roots:
            del sys.modules[name]
    aliases = tuple(f"__import_{root}" for root in roots)
    for module in list(sys.modules.values()):
        for name in [one for one in getattr(module, "__dict__", ()) if one.startswith(aliases)]:
            delattr(module, name)
