"""Forget modules between tests: several checkouts have packages of one name."""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch._dynamo import symbolic_convert


def forget_modules(roots: Collection[str]) -> None:
    """Drop modules of these packages, whoever imported them, and what Dynamo knows of them.

    Dynamo keeps names for them in the globals of the frame that it traces, and each module that it
    has imported by its name for good: it would guard on a module of the same name that is gone.
    """
    for name in list(sys.modules):
        if name.partition(".")[0] in roots:
            del sys.modules[name]
    aliases = tuple(f"__import_{root}" for root in roots)
    for module in list(sys.modules.values()):
        for name in [one for one in getattr(module, "__dict__", ()) if one.startswith(aliases)]:
            delattr(module, name)
    imported = getattr(symbolic_convert, "_import_module", None)
    if imported is not None and hasattr(imported, "cache_clear"):
        imported.cache_clear()
