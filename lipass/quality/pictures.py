"""Compare pictures with the same index: raw tensors, never decoded from a compressed film.

All figures are computed in float64 on the CPU, a few pictures at a time, as films are large.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.quality import checks

CAP_DB = 100.0
# Wang et al. 2004: a Gaussian window of 11 x 11 with a deviation of 1.5, K1 and K2.
_RADIUS, _SIGMA, _K1, _K2 = 5, 1.5, 0.01, 0.03
_BATCH = 4


def psnr_db(x: Tensor, y: Tensor) -> float:
    """PSNR of two sets of pictures `[F, C, H, W]` in 0..1, errors averaged before the logarithm.

    Source: ITU-T; equals `skimage.metrics.peak_signal_noise_ratio` with a range of 1. Differs in:
    equal pictures give 100 and nothing gives more, as a mean of infinities says nothing.
    """
    return _decibel(_errors(x, y).mean()).item()


def psnr_each_db(x: Tensor, y: Tensor) -> Tensor:
    """PSNR `[F]` of each pair of pictures `[F, C, H, W]`; see `psnr_db`."""
    return _decibel(_errors(x, y))


def _errors(x: Tensor, y: Tensor) -> Tensor:
    """Mean square error of each picture `[F]`."""
    pairs = zip(*checks.alike(x, y), strict=True)
    return torch.stack([(a.double() - b.double()).square().mean() for a, b in pairs])


def _decibel(error: Tensor) -> Tensor:
    return (-10 * torch.log10(error)).clamp(max=CAP_DB)


def ssim(x: Tensor, y: Tensor) -> float:
    """Mean SSIM of two sets of pictures `[F, C, H, W]` in 0..1; see `ssim_each`."""
    return ssim_each(x, y).mean().item()


def ssim_each(x: Tensor, y: Tensor) -> Tensor:
    """SSIM `[F]` of each pair of pictures `[F, C, H, W]` in 0..1, mean over channels.

    Source: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004; equals
    `skimage.metrics.structural_similarity` with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1`. Windows that pass the border are left out.

    Raises:
        ValueError: pictures smaller than a window of 11 x 11.
    """
    x, y = checks.alike(x, y)
    side = 2 * _RADIUS + 1
    if min(x.shape[-2:]) < side:
        raise ValueError(
            f"SSIM needs pictures of at least {side} x {side}, got {list(x.shape[-2:])}; "
            "compare larger ones"
        )
    pairs = zip(x.split(_BATCH), y.split(_BATCH), strict=True)
    return torch.cat([_ssim(a.double(), b.double()) for a, b in pairs])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _window(x), _window(y)
    xx, yy = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    xy = _window(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    same = (2 * mean_x * mean_y + c1) * (2 * xy + c2)
    return (same / ((mean_x**2 + mean_y**2 + c1) * (xx + yy + c2))).flatten(1).mean(1)


def _window(x: Tensor) -> Tensor:
    """Average windows of pictures `[F, C, H, W]` with Gaussian weights."""
    at = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype)
    weights = torch.exp(-0.5 * (at / _SIGMA) ** 2)
    weights = weights / weights.sum()
    flat = x.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(*x.shape[:2], *flat.shape[-2:])


def affected(x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Tell `[F]` which frames of `[F, ...]` lie in a chunk of `chunk` frames that differs at all.

    Where a method leaves most chunks alone, a mean over all hides what it does to the rest.
    """
    pairs = zip(x.split(chunk), y.split(chunk), strict=True)
    return torch.cat([torch.full((len(a),), not torch.equal(a, b)) for a, b in pairs])


def latent_error(x: Tensor, y: Tensor) -> float:
    """Relative error `|x - y| / |y|` of latents of one shape.

    Raises:
        ValueError: their shapes differ, `y` is zero, or a value is not finite.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"latents must have one shape, got {list(x.shape)} and {list(y.shape)}; compare the "
            "same ones of both"
        )
    a, b = x.detach().cpu().double(), y.detach().cpu().double()
    if not (checks.is_finite(a) and checks.is_finite(b)) or not b.any():
        raise ValueError(
            "latents must be finite, and those of the dense model not all zero, got others; look "
            "at what made them"
        )
    return float((a - b).norm() / b.norm())
