"""Refuse what no figure could be made of, before any is."""

from __future__ import annotations

import torch
from torch import Tensor

# Decoders overshoot a little; bytes and numbers around zero do not look like that.
_LOW, _HIGH = -1.0, 2.0


def pictures(x: Tensor, name: str) -> Tensor:
    """Return pictures `[F, C, H, W]` on the CPU, in float32 or float64.

    Raises:
        TypeError: no tensor, or whole numbers.
        ValueError: another number of dimensions, NaN or infinities, or values far from 0..1.
    """
    shown = _on_the_cpu(x, name)
    if not shown.isfinite().all():
        count = int((~shown.isfinite()).sum())
        raise ValueError(
            f"{name} must be finite, got {count} of {shown.numel()} values that are not; look at "
            "what made them"
        )
    low, high = float(shown.min()), float(shown.max())
    if low < _LOW or high > _HIGH:
        raise ValueError(f"{name} must lie in 0..1, got {low:.3g} to {high:.3g}; scale them first")
    return shown


def broken(x: Tensor, name: str) -> Tensor:
    """Tell `[F]` which pictures `[F, C, H, W]` have values that are not finite or far from 0..1.

    Raises:
        TypeError: no tensor, or whole numbers.
        ValueError: another number of dimensions.
    """
    flat = _on_the_cpu(x, name).flatten(1)
    return ~((flat >= _LOW) & (flat <= _HIGH)).all(1)


def _on_the_cpu(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor in 0..1, got {got}; divide bytes by 255"
        )
    if x.dim() != 4 or not x.numel():
        raise ValueError(
            f"{name} must be pictures [F, C, H, W], at least one, got {list(x.shape)}; "
            "decode latents first, and put frames in front"
        )
    shown = x.detach().cpu()
    if shown.dtype != torch.float64:
        shown = shown.float()
    return shown


def alike(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Return two sets of pictures `[F, C, H, W]` of one shape.

    Raises:
        ValueError: their shapes differ, or one of them is refused.
    """
    a, b = (pictures(each, name) for each, name in zip((x, y), names, strict=True))
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have one shape, got {list(a.shape)} and "
            f"{list(b.shape)}; compare the same frames of both, at one size"
        )
    return a, b


def cameras(w2c: Tensor, frames: int) -> Tensor:
    """Return cameras `[F, 4, 4]`, one a frame, as float64 on the CPU.

    Raises:
        ValueError: another shape or number, or values that are not finite.
    """
    if w2c.shape != (frames, 4, 4) or not w2c.isfinite().all():
        raise ValueError(
            f"cameras must be finite world-to-camera matrices [{frames}, 4, 4], one a frame, got "
            f"{list(w2c.shape)}; repeat or interpolate those of latents"
        )
    return w2c.detach().cpu().double()


def whole(value: int, name: str, least: int = 1) -> int:
    """Return a whole number.

    Raises:
        ValueError: it is none, or too small.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
    return value


def is_finite(x: Tensor) -> bool:
    """Tell whether all values of a tensor are numbers."""
    return bool(torch.isfinite(x).all())
