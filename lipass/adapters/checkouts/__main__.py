"""Examine one checkout in a process of its own: `python -m lipass.adapters.checkouts FAMILY PATH`.

What a checkout does when it is imported (settings of torch, globals, prints) stays here; what was
found is written to the file that is named last, as one JSON document.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path


def main(family: str, checkout: str, answer: str) -> int:
    """Write findings, or what the checkout lacks; return 0 where all holds."""
    sys.dont_write_bytecode = True  # the checkout stays as it is
    from lipass.adapters.checkouts.examine import examine

    found: dict[str, object]
    try:
        build = import_module(f"lipass.adapters.checkouts.{family}").build
        findings = examine(build(Path(checkout)))
        found = {**asdict(findings), "holds": findings.holds, "error": ""}
    except Exception as error:
        traceback.print_exc()
        found = {"holds": False, "error": f"{type(error).__name__}: {error}"}
    Path(answer).write_text(json.dumps(found))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
