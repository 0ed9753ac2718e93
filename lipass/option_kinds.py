"""Check of what kind the value of an option is, and say how to write what was meant."""

from __future__ import annotations

import math
import re
from typing import Any

_WORDS = {
    "str": "a string",
    "bool": "True or False",
    "int": "an int",
    "int | None": "None or an int",
    "float": "a number",
    "tuple[int, int, int]": "three ints",
    "tuple[int, int, int] | None": "None or three ints",
    "tuple[int, ...] | None": "None or a tuple of ints",
    "tuple[int, ...]": "a tuple of ints",
    "str | tuple[int, ...]": "a string or a tuple of ints",
    "tuple[str, ...]": "a tuple of strings",
    "tuple[float, float] | None": "None or two numbers",
}


def _remedy(kind: str, value: Any) -> str:
    """Say how to write what was probably meant."""
    if isinstance(value, str) and "str" not in kind:
        if re.fullmatch(r"-?[\d.]+", value):
            return f"write {value} without quotes"
        if re.fullmatch(r"\d+([x,]\d+)+", value):
            return f"write ({', '.join(re.findall('[0-9]+', value))})"
    if kind == "bool":
        return f"write {bool(value)}"
    if kind.startswith("tuple[") and type(value).__name__ in kind and "..." in kind:
        return f"write ({value!r},)"
    return "see `lipass options`"


def coerced(key: str, value: Any, kind: Any) -> Any:
    """Check the kind of a value; only ints to floats and lists to tuples are converted."""
    kind = {str: "str", bool: "bool"}.get(kind, kind)
    plain_int = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, list):
        value = tuple(value)
    ints = isinstance(value, tuple) and all(type(item) is int for item in value)
    numbers = isinstance(value, tuple) and all(_is_number(item) for item in value)
    accepts = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": plain_int,
        "int | None": value is None or plain_int,
        "float": _is_number(value),
        "tuple[int, int, int]": ints and len(value) == 3,
        "tuple[int, int, int] | None": value is None or (ints and len(value) == 3),
        "tuple[int, ...] | None": value is None or ints,
        "tuple[int, ...]": ints,
        "str | tuple[int, ...]": isinstance(value, str) or ints,
        "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(x, str) for x in value),
        "tuple[float, float] | None": value is None or (numbers and len(value) == 2),
    }
    if not accepts[kind]:
        raise TypeError(
            f"option {key!r} must be {_WORDS[kind]}, got {value!r}; {_remedy(kind, value)}"
        )
    if kind == "tuple[float, float] | None" and value is not None:
        return tuple(map(float, value))
    return float(value) if kind == "float" else value


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isnan(value)
    return isinstance(value, int) and not isinstance(value, bool)
