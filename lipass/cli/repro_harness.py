"""Compare two modules on random inputs; the source of this file goes into every repro script.

It needs torch and nothing else, so that a script can be sent to somebody who has no lipass, as
long as the graphs in it call no operator of lipass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

_GENERATOR = torch.Generator().manual_seed(0)


def random(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, scale: float = 1.0
) -> torch.Tensor:
    """Draw a tensor; integers and booleans are 0 or 1, which are indices into most things."""
    length = _length(shape, stride)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.promote_types(dtype, torch.float32)
        memory = (torch.randn(length, generator=_GENERATOR, dtype=wide) * scale).to(dtype)
    else:
        memory = torch.randint(2, (length,), generator=_GENERATOR).to(dtype)
    return memory.as_strided(tuple(shape), tuple(stride))


def cameras(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, scale: float = 0.1
) -> torch.Tensor:
    """Draw world-to-camera matrices `[.., 4, 4]` that look the same way from places nearby."""
    # Where cameras are expanded, the first stands for all.
    own = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    matrices = torch.eye(4, dtype=dtype).expand(own).clone()
    matrices[..., :3, 3] = random(own, torch.empty(own).stride(), dtype, scale)[..., :3, 3]
    return torch.empty_strided(own, stride, dtype=dtype).copy_(matrices).expand(*shape)


def compare(
    before: Callable[..., Any], after: Callable[..., Any], inputs: dict[str, Any], tolerance: float
) -> int:
    """Run both on copies of the inputs and print how far they differ and how long they take.

    What they write into their inputs is compared like what they return.

    Args:
        before: the graph as Dynamo made it.
        after: the graph behind the passes.
        inputs: arguments by name.
        tolerance: largest difference allowed, as a share of the largest value.

    Returns:
        The exit code: 0 if they agree, 1 if they differ.
    """
    expected, before_ms = _run(before, inputs)
    actual, after_ms = _run(after, inputs)
    print(f"before {before_ms:.2f} ms, after {after_ms:.2f} ms")
    if len(expected) != len(actual):
        print(f"they differ: {len(expected)} outputs before, {len(actual)} after")
        return 1
    worst, reasons = 0.0, []
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if type(a) is not type(b) or a != b:
                reasons.append(f"value {index} is {a} before, {b} after")
        elif a.shape != b.shape or a.dtype != b.dtype:
            reasons.append(f"value {index} is {_kind(a)} before, {_kind(b)} after")
        elif a.numel() and not torch.equal(a, b):
            wide = torch.promote_types(a.dtype, torch.float32)
            off = (a.to(wide) - b.to(wide)).abs().max() / a.to(wide).abs().max().clamp(min=1e-6)
            worst = max(worst, float(off.nan_to_num(nan=float("inf"))))
    if not worst <= tolerance:
        reasons.append(f"the largest error is over {tolerance:.2g}")
    print(f"largest error {worst:.2g} of the largest value, {tolerance:.2g} allowed")
    print("they agree" if not reasons else f"they differ: {'; '.join(reasons)}")
    return int(bool(reasons))


def _run(module: Callable[..., Any], inputs: dict[str, Any]) -> tuple[list[Any], float]:
    """Return all outputs and inputs behind a call, and the milliseconds of a second call."""
    with torch.no_grad():
        for _ in range(2):
            given = {name: _copy(value) for name, value in inputs.items()}
            torch.manual_seed(0)
            begin = time.perf_counter()
            outputs = module(**given)
            seconds = time.perf_counter() - begin
    return pytree.tree_leaves((outputs, list(given.values()))), seconds * 1e3


def _copy(value: Any) -> Any:
    """Copy a tensor with its strides; elements that share memory go on doing so."""
    if not isinstance(value, torch.Tensor):
        return value
    memory = value.as_strided((_length(value.shape, value.stride()),), (1,)).clone()
    return memory.as_strided(value.shape, value.stride())


def _length(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements of memory a tensor reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"
