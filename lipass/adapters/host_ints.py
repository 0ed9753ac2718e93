"""Hold sizes as ints where released code makes small tensors of them and reads these back.

`torch.tensor(x.shape[2:])` and then `.tolist()` or `.item()` in each layer: on a GPU each is a
device read, under Dynamo a graph break, or a size that no pass can prove anything about.
`HostInts` are asked like a tensor and hold ints, symbolic ones too; `host_torch` makes them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch


class HostInts:
    """Ints that are asked like a tensor: one, a list, or a list of lists."""

    def __init__(self, values: Any) -> None:
        self.values = values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand a function of torch the tensor that it takes these for."""
        return func(*map(as_tensor, args), **{k: as_tensor(v) for k, v in (kwargs or {}).items()})

    def tolist(self) -> Any:
        """Return the ints."""
        if isinstance(self.values, list):
            return [HostInts(one).tolist() for one in self.values]
        return self.values

    def item(self) -> int:
        """Return the only one."""
        found = self.values
        while isinstance(found, list):
            (found,) = found
        only: int = found
        return only

    def fill_(self, value: Any) -> HostInts:
        """Replace each."""
        self.values = _like(self.values, plain(value))
        return self

    def zero_(self) -> HostInts:
        """Replace each by 0."""
        return self.fill_(0)

    def copy_(self, other: Any) -> HostInts:
        """Replace them by others."""
        self.values = plain(other.tolist())
        return self

    def clone(self) -> HostInts:
        """Return a copy."""
        return HostInts(self.tolist())

    def to(self, *given: Any, **named: Any) -> HostInts:
        """Stay on the host, whatever device is asked for."""
        return self

    def size(self, axis: int | None = None) -> Any:
        """Return how many there are."""
        shape = self.shape
        return shape if axis is None else shape[axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are along each axis."""
        found, shape = self.values, []
        while isinstance(found, list):
            shape.append(len(found))
            found = found[0] if found else 0
        return tuple(shape)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What they would be as a tensor."""
        return torch.long

    def dim(self) -> int:
        """Return how many axes there are."""
        return len(self.shape)

    def numel(self) -> int:
        """Return how many ints there are."""
        return math.prod(self.shape)

    # Dynamo fails at a comparison of an object with a size that varies, and lengths are compared
    def max(self) -> int:
        """Return the largest, a plain int."""
        return max(_flat(self.values))

    def min(self) -> int:
        """Return the smallest, a plain int."""
        return min(_flat(self.values))

    def all(self) -> bool:
        """Say whether none is 0 or false."""
        return all(_flat(self.values))

    def any(self) -> bool:
        """Say whether one is neither 0 nor false."""
        return any(_flat(self.values))

    def sum(self) -> HostInts:
        """Return the sum of all."""
        return HostInts(sum(_flat(self.values)))

    def prod(self, axis: int | None = None) -> HostInts:
        """Return the product of all, or along the last axis."""
        if axis is None or self.dim() == 1:
            return HostInts(math.prod(_flat(self.values)))
        if axis not in (-1, self.dim() - 1):
            raise NotImplementedError(
                "a product of sizes must be along the last axis, got axis "
                f"{axis} of {self.dim()}; multiply the sizes one by one"
            )
        return HostInts([HostInts(one).prod().values for one in self.values])

    def __getitem__(self, index: Any) -> HostInts:
        if not isinstance(index, tuple):
            return HostInts(self.values[plain(index)])
        first, *rest = index
        if not rest:
            return self[first]
        if isinstance(first, slice):
            return HostInts([HostInts(one)[tuple(rest)].values for one in self.values[first]])
        return self[first][tuple(rest)]

    def __setitem__(self, index: Any, value: Any) -> None:
        first, *rest = index if isinstance(index, tuple) else (index,)
        value = plain(value)
        rows, each = [first], [value]
        if isinstance(first, slice):
            rows = list(range(*first.indices(len(self.values))))
            each = value if isinstance(value, list) else [value] * len(rows)
        for i, one in zip(rows, each, strict=True):
            if rest:
                HostInts(self.values[i])[tuple(rest)] = one
            else:
                self.values[i] = _like(self.values[i], one)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[HostInts]:
        return (HostInts(one) for one in self.values)

    def __index__(self) -> int:
        return self.item()

    def __int__(self) -> int:
        return self.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"HostInts({self.values})"

    def __add__(self, other: Any) -> Any:
        return _each(operator.add, self, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return _each(operator.mul, self, other)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Any:
        return _each(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _each(_from, self, other)

    def __floordiv__(self, other: Any) -> Any:
        return _each(operator.floordiv, self, other)

    def __mod__(self, other: Any) -> Any:
        return _each(operator.mod, self, other)

    def __eq__(self, other: object) -> Any:
        return _each(operator.eq, self, other)

    def __ne__(self, other: object) -> Any:
        return _each(operator.ne, self, other)

    def __lt__(self, other: Any) -> Any:
        return _each(operator.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return _each(operator.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return _each(operator.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return _each(operator.ge, self, other)


for _same in ("long", "int", "cpu", "cuda", "detach", "contiguous"):
    setattr(HostInts, _same, HostInts.to)


def as_tensor(given: Any) -> Any:
    """Return the tensor that ints stand for; anything else as it is, also inside of lists."""
    if isinstance(given, HostInts):
        return torch.tensor(given.tolist(), dtype=torch.long)
    if isinstance(given, (list, tuple)) and any(isinstance(one, HostInts) for one in given):
        return type(given)(map(as_tensor, given))
    return given


def plain(given: Any) -> Any:
    """Return ints in place of `HostInts`."""
    return given.tolist() if isinstance(given, HostInts) else given


def _each(apply: Callable[[Any, Any], Any], ours: Any, theirs: Any) -> Any:
    """Compute with each; of one it is an int or a bool, which Dynamo slices and branches by."""
    ours, theirs = plain(ours), plain(theirs)
    if isinstance(ours, list):
        others = theirs if isinstance(theirs, list) else [theirs] * len(ours)
        pairs = zip(ours, others, strict=True)
        return HostInts([plain(_each(apply, one, other)) for one, other in pairs])
    return apply(ours, theirs)


def _from(ours: Any, theirs: Any) -> Any:
    return theirs - ours


def _like(values: Any, value: Any) -> Any:
    if not isinstance(values, list):
        return value
    others = value if isinstance(value, list) else [value] * len(values)
    return [_like(one, other) for one, other in zip(values, others, strict=True)]


def _flat(values: Any) -> list[int]:
    if not isinstance(values, list):
        return [values]
    return [one for part in values for one in _flat(part)]
