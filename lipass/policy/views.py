"""Check cameras before anything is decided from them, and score them against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.view_overlap.api import may_see, point_visibility
from lipass.options import ViewOptions

# bf16 poses (HY-WorldPlay keeps them so) are orthonormal to about 0.01.
_RIGID_TOLERANCE = 0.05


def check_poses(poses: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    """Check the cameras of a chunk and bring them to the host.

    Args:
        poses: `[M, 4, 4]` world-to-camera matrices of the history (OpenCV axes, docs/poses.md);
            None is no history.
        query: `[q, 4, 4]` of the latents to be generated, on the device of `poses`.

    Returns:
        Both on the CPU in float64; the history `[0, 4, 4]` where there is none.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: wrong shape or device, no cameras, NaN or infinity, not a rigid transform.
    """
    _check_kind("query", query, "the cameras of the latents to generate")
    if poses is None:
        host = _to_host(query)
        _refuse("query", host, _rigid_error(host))
        return host[:0], host
    _check_kind("poses", poses, "the cameras of the history; None for a first chunk without one")
    if poses.device != query.device:
        raise ValueError(
            f"poses and query must be on one device, got {poses.device} and {query.device}; "
            "move one of them (the CPU is best: decisions are taken there)"
        )
    host = _to_host(torch.cat([poses.double(), query.double()]))
    history = len(poses)
    error = _rigid_error(host)
    if not bool(error.max() <= _RIGID_TOLERANCE):  # also where it is NaN
        _refuse("poses", host[:history], error[:history])
        _refuse("query", host[history:], error[history:])
    return host[:history], host[history:]


def score_points(poses: Tensor, query: Tensor, view: ViewOptions) -> Tensor:
    """Score each sampled point of each new view against each history view.

    Args:
        poses: `[M, 4, 4]` from `check_poses`.
        query: `[q, 4, 4]` from `check_poses`.
        view: the camera and the depths of the scene.

    Returns:
        `[q, M, P]` float32 in [0, 1]; its mean over P is the view overlap.
    """
    camera = (view.hfov_deg, view.vfov_deg, view.near, view.far)
    looks_on = may_see(query, poses, *camera).nonzero()[:, 0]
    if len(looks_on) == len(poses):
        return point_visibility(query, poses, *camera)
    seen = point_visibility(query, poses[looks_on], *camera)
    every = seen.new_zeros(len(query), len(poses), seen.shape[2])
    return every.index_copy_(1, looks_on, seen)


def _to_host(cameras: Tensor) -> Tensor:
    return cameras.detach().to("cpu", torch.float64)


def _check_kind(name: str, cameras: Tensor, meaning: str) -> None:
    if not isinstance(cameras, Tensor) or not cameras.is_floating_point():
        kind = cameras.dtype if isinstance(cameras, Tensor) else type(cameras).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}; pass {meaning}")
    if cameras.dim() != 3 or cameras.shape[-2:] != (4, 4):
        raise ValueError(
            f"{name} must have shape [latents, 4, 4], got {list(cameras.shape)}; "
            "pass one world-to-camera matrix a latent, without a batch dimension"
        )
    if len(cameras) == 0:
        raise ValueError(f"{name} must hold at least one camera, got none; pass {meaning}")
    if cameras.device.type == "meta":
        raise ValueError(f"{name} must hold values, got a tensor on device meta; pass {meaning}")


def _rigid_error(cameras: Tensor) -> Tensor:
    """Largest deviation of each matrix from a rigid transform, `[M]`; NaN if not finite."""
    left = cameras[:, :, :3]  # rotation above (0 0 0), so left @ left^T is diag(1, 1, 1, 0)
    expected = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=cameras.dtype))
    skew = (left @ left.transpose(1, 2) - expected).abs().amax((1, 2))
    mirrored = (torch.linalg.det(left[:, :3]) - 1).abs()
    corner = (cameras[:, 3, 3] - 1).abs() + cameras[:, :3, 3].sum(1) * 0
    return torch.maximum(torch.maximum(skew, mirrored), corner)


def _refuse(name: str, cameras: Tensor, error: Tensor) -> None:
    bad = (~cameras.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in latent {bad[0]} ({len(bad)} in all); "
            "check the inversion that made the matrix"
        )
    index = int(error.argmax())
    if error[index] > _RIGID_TOLERANCE:
        raise ValueError(
            f"{name} must be rigid world-to-camera matrices (rotation, translation, last row "
            f"0 0 0 1), got one that is off by {float(error[index]):.3g} at latent {index}; "
            "remove scale and intrinsics from it"
        )
