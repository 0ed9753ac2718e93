"""Hear from Dynamo where it runs a function as it is: no graph of it reaches a backend.

It does so behind its limit of recompilations, and where a graph breaks inside of a loop. The limit
is a line of its log, the break passes where a compilation ends; both are called from within the
compilation, and its frame knows for which backend that is.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch._dynamo.convert_frame
from torch._dynamo.exc import ShortenTraceback, Unsupported

from lipass.compile.graph_breaks import GraphBreak, parts_of
from lipass.config import Config
from lipass.errors import LipassError, LipassWarning
from lipass.passes.graph.compat import backends_of, can_isolate
from lipass.passes.graph.frame import on_compile_end, recompile_reasons, when_left
from lipass.receipt import current_report

_LIMIT = re.compile(r"\w*recompile_limit$")
_VALUE = re.compile(r"^(?P<name>[\w.\[\]']+) == (?P<value>-?[\d.]+|'[^']*'|None|True|False)$")
# How Dynamo names what a module holds, in guards.
_GLOBAL = re.compile(r"__import_(\w+)")
# Fewer backends of one function are no comparison, and reach no limit by themselves.
_COMPARED = 3
_RESET = (
    "call torch._dynamo.reset() before the next torch.compile, or raise "
    "torch._dynamo.config.recompile_limit"
)
_ISOLATE = f"compile each with torch.compile(..., isolate_recompiles=True); or {_RESET}"
_PRESET = re.compile(r"'(?:preset|mode)': '([\w-]+)'")
_SHOWN = 4
_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+?)_at_\d+\w*")


class LeftEager(LipassError, ShortenTraceback):
    """Report under `strict` what is left to Python.

    Dynamo calls errors that it does not know its own; those of this class it passes on.
    """

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def listen(backend: Any) -> None:
    """Record in the receipt what Dynamo leaves to Python of the functions of a backend."""
    handler = _Limit(backend)
    logging.getLogger(torch._dynamo.convert_frame.__name__).addHandler(handler)
    on_compile_end(lambda: _at_the_end(backend))


class _Limit(logging.Handler):
    """Take the line of the log that says that a limit is reached."""

    def __init__(self, backend: Any) -> None:
        super().__init__(logging.WARNING)
        self._backend = backend

    def emit(self, record: logging.LogRecord) -> None:
        """Record the limit, where it is ours."""
        given = record.args
        if not isinstance(given, tuple) or len(given) < 2 or not _LIMIT.match(str(given[0])):
            return
        compilation = _compilation(self._backend)
        if compilation is None:
            return
        code, config = compilation
        reasons = recompile_reasons(code)
        why, remedy = in_words(reasons), _remedy(reasons, code)
        backends = _backends(code)
        if len(backends) >= _COMPARED:
            why = (
                f"it is compiled {len(backends)} times over, for {', '.join(backends)}, which "
                f"count together; of the latest, {why}"
            )
            remedy = _ISOLATE if can_isolate() else _RESET
        reached = f"torch's limit of {given[1]} recompilations is reached: {why}"
        _tell(GraphBreak(_place(code), reached, remedy), config)


def _at_the_end(backend: Any) -> None:
    """Record a break that ends a compilation without a graph."""
    error = sys.exc_info()[1]
    compilation = _compilation(backend) if isinstance(error, Unsupported) else None
    if compilation is None:
        return
    code, config = compilation
    reason, remedy = parts_of(str(getattr(error, "msg", error)))
    if "RestartAnalysis" in reason:
        return  # only this call: the next value of a float is compiled again
    found = GraphBreak(_place(code), f"nothing of it is a graph: {reason}", remedy)
    # What is raised here would leave Dynamo in the middle of a compilation.
    when_left(lambda: _tell(found, config))


def _compilation(backend: Any) -> tuple[CodeType, Config] | None:
    """Return the function that is being compiled, and the options, if it is for this backend."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        given = frame.f_locals
        if frame.f_code.co_name == "_compile" and {"compiler_fn", "code"} <= given.keys():
            made = given["compiler_fn"]
            while hasattr(made, "_torchdynamo_orig_backend"):
                made = made._torchdynamo_orig_backend
            if getattr(made, "compiler_fn", made) is not backend:
                return None
            options = getattr(made, "kwargs", {})
            return given["code"], Config.resolve(options.get("mode"), options.get("options"))
        frame = frame.f_back
    return None


def _tell(found: GraphBreak, config: Config) -> None:
    report = current_report()
    if any(one.source == found.source for one in report.left_eager):
        return
    report.left_eager.append(found)
    message = (
        f"every call of a compiled model must run compiled, got {found.source}, which Python runs "
        f"from now on: {found.reason}; {found.remedy}"
    )
    if config.strict:
        raise LeftEager(f"strict: {message}")
    warnings.warn(message, LipassWarning, stacklevel=2)


def _place(code: CodeType) -> str:
    name = _RESUMED.sub(r"\1", code.co_qualname)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} in {name}"


def in_words(reasons: Sequence[str]) -> str:
    """Say which guards failed: values of one argument together, anything else as torch has it."""
    values = _values(reasons)
    if values:
        name, seen = max(values.items(), key=lambda item: len(item[1]))
        if len(seen) > 1:
            more = ", .." if len(seen) > _SHOWN else ""
            return f"`{name}` was {', '.join(seen[:_SHOWN])}{more}"
    return _as_written(reasons[-1]) if reasons else "torch does not say which guard failed"


def _backends(code: CodeType) -> list[str]:
    """Name what one function is compiled for, by preset where it is for this backend."""
    names = []
    for backend in backends_of(code):
        text = str(getattr(backend, "kwargs", {}))
        preset = _PRESET.search(text)
        names.append(f"preset {preset[1]!r}" if preset else "another backend")
    return names


def _remedy(reasons: Sequence[str], code: CodeType) -> str:
    values = _values(reasons)
    name = max(values, key=lambda key: len(values[key])) if values else ""
    if len(values.get(name, ())) < 2:
        return (
            "let calls agree in it, or raise torch._dynamo.config.recompile_limit where it has "
            "few forms"
        )
    if re.fullmatch(r"-?[\d.]+", values[name][-1]):
        root = re.split(r"[.\[]", name)[0]
        if root not in (*code.co_varnames, *code.co_freevars, *code.co_cellvars):
            return (
                f"let the call take `{name}` as an argument, which Dynamo lets vary; what a "
                "module holds is a constant of each graph"
            )
        return (
            f"pass `{name}` as a tensor, or what is computed from it; where it has few values, "
            "raise torch._dynamo.config.recompile_limit"
        )
    return f"compile the model once for each value of `{name}`"


def _as_written(guard: str) -> str:
    """Name values of modules as code does, `package.module.NAME`."""
    return _GLOBAL.sub(lambda found: found[1].replace("_dot_", "."), guard)


def _values(reasons: Iterable[str]) -> dict[str, list[str]]:
    """Collect the values that guards compare arguments and attributes with."""
    found: dict[str, list[str]] = {}
    for reason in map(_as_written, reasons):
        if matched := _VALUE.match(reason):
            seen = found.setdefault(matched["name"], [])
            if matched["value"] not in seen:
                seen.append(matched["value"])
    return found
