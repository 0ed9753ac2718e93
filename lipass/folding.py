"""Say once what is true of many equal layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Names of nodes and measured times differ from layer to layer of which the same is true.
_OWN = re.compile(r"%\w+|\d+\.\d+(?= ms)")


def same_reason(reason: str) -> str:
    """Return a reason without what only tells equal layers apart."""
    return _OWN.sub("*", reason)


def layer_kind(name: str) -> str:
    """Return a name without the numbers of its layer."""
    return re.sub(r"\d+", "*", name)


def folded(names: Sequence[str]) -> str:
    """Name layers that differ in numbers only: `blocks.0-53.attn1`; the first and last else."""
    parts = [re.split(r"(\d+)", name) for name in dict.fromkeys(names)]
    if len(parts) == 1:
        return names[0]
    if len({len(part) for part in parts}) > 1:
        return f"{names[0]} .. {names[-1]}"
    return "".join(_column(column) for column in zip(*parts, strict=True))


def _column(texts: tuple[str, ...]) -> str:
    distinct = list(dict.fromkeys(texts))
    if len(distinct) == 1:
        return distinct[0]
    if not all(text.isdecimal() for text in distinct):
        return "*"
    numbers = sorted(map(int, distinct))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers)) if len(numbers) <= 4 else "*"
