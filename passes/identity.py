"""Tell what may compile differently from what may not: a uuid of passes, options and versions.

A graph that a pass has rewritten is itself part of the keys of torch's caches, and so are the
options of the passes as far as they change it. What no graph shows is the code of the operators in
it: their fake implementations decide strides that Inductor writes into its code. That is what
`code_uuid` is for; `uuid` is for whoever keeps anything under the name of a pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lipass.kernels.source import kernels_hash, source_hash

if TYPE_CHECKING:
    from lipass.passes.core import Pass


def uuid_of(one: Pass) -> str:
    """Return what changes with a pass's source, its options and the version of torch."""
    options = [f"{f.name}={getattr(one, f.name)!r}" for f in dataclasses.fields(one)]
    return _hash([one.name, *options, code_uuid([one])])


def uuid_of_pipeline(passes: Iterable[Pass]) -> str:
    """Return what changes with any of the passes or with their order."""
    return _hash([uuid_of(one) for one in passes])


def code_uuid(passes: Iterable[Pass]) -> str:
    """Return what changes with the source of passes and operators and the version of torch.

    Options are no part of it, nor is which passes of lipass run.
    """
    own = {source for one in passes for kind in type(one).__mro__ if (source := _source(kind))}
    here = source_hash(Path(__file__).parent)
    versions = [torch.__version__, str(torch.version.git_version)]
    return _hash([*versions, kernels_hash(), here, *sorted(own)])


def _source(kind: type) -> str:
    """Return the source of the module of a class; nothing for lipass's own and Python's."""
    if kind.__module__.startswith("lipass.passes") or kind.__module__ in ("builtins", "abc"):
        return ""
    try:
        file = inspect.getsourcefile(kind)
        return "" if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return _of_this_process()


@functools.cache
def _of_this_process() -> str:
    """Stand for a source that is not to be had: that of a class typed in may differ next time."""
    return str(uuid.uuid4())


def _hash(parts: list[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)}:{part}".encode())
    return found.hexdigest()
