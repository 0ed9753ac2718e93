"""Hold a video against the true shape of what it shows: depth and cameras are known.

A renderer or a simulator knows both, so that no depth or motion has to be estimated, as benchmarks
of films must. Depth `[F, H, W]` is along the camera's axis, in the unit of the cameras; cameras
are world to camera, OpenCV axes. Tokens, pixels and fields of view are those of a pinhole camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.policy.convention import inverted
from lipass.quality import checks
from lipass.quality.pictures import CAP_DB

# A point is hidden where the other view sees something nearer, by this share of the distance.
_HIDDEN = 0.05
_SEEN_LEAST = 0.2
_PATCH, _SEARCH = 16, 3
# What a shift of one pixel must save of the mean square: flat patches fit everywhere.
_SHIFT_COST = 1e-5
_TEXTURE = 0.02
# How much of the commanded motion may have been made; frozen is 0, backwards -1.
_SHARES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_OBEYED = 0.5
_STILL, _TELLING = 1e-3, 1e-4


@dataclass(frozen=True)
class Space:
    """Where a video was seen from, and how far what it shows is away.

    Args:
        w2c: cameras `[F, 4, 4]`.
        depth: `[F, H, W]`.
        hfov_deg: horizontal field of view.
        vfov_deg: vertical field of view.

    Raises:
        ValueError: shapes that do not fit together, depth that is not positive, or no such view.
    """

    w2c: Tensor
    depth: Tensor
    hfov_deg: float
    vfov_deg: float

    def __post_init__(self) -> None:
        if self.depth.dim() != 3 or not bool((self.depth > 0).all()):
            raise ValueError(
                f"depth must be positive, [F, H, W], got {list(self.depth.shape)} with a least of "
                f"{float(self.depth.min()) if self.depth.numel() else None}; give that along the "
                "camera's axis, the far plane where nothing is hit"
            )
        if not (0 < self.hfov_deg < 180 and 0 < self.vfov_deg < 180):
            raise ValueError(
                "fields of view must lie between 0 and 180 degrees, got "
                f"{(self.hfov_deg, self.vfov_deg)}; the whole angle, not its half"
            )
        object.__setattr__(self, "w2c", checks.cameras(self.w2c, len(self.depth)))
        object.__setattr__(self, "depth", self.depth.detach().cpu().double())

    def rays(self) -> Tensor:
        """Directions `[H, W, 3]` of pixel centres, of depth 1."""
        rows, columns = self.depth.shape[1:]
        half = torch.tan(torch.deg2rad(torch.tensor([self.hfov_deg, self.vfov_deg]) / 2)).double()
        x = ((torch.arange(columns) + 0.5) / columns * 2 - 1) * half[0]
        y = ((torch.arange(rows) + 0.5) / rows * 2 - 1) * half[1]
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([x, y, torch.ones_like(x)], -1)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where points `[.., 3]` lie in a picture `[.., 2]`, -1..1, and their depth."""
        half = torch.tan(torch.deg2rad(torch.tensor([self.hfov_deg, self.vfov_deg]) / 2)).double()
        ahead = points[..., 2].clamp(min=1e-9)
        return points[..., :2] / (ahead[..., None] * half), points[..., 2]

    def seen_from(self, frame: int, other: int) -> tuple[Tensor, Tensor]:
        """Where pixels of `frame` lie in `other` `[H, W, 2]`, and which are seen there."""
        between = self.w2c[other] @ inverted(self.w2c[frame, None])[0]
        points = self.rays() * self.depth[frame][..., None]
        at, ahead = self.project(points @ between[:3, :3].T + between[:3, 3])
        nearest = sample(self.depth[other][None], at)[0]
        inside = (at.abs() < 1).all(-1) & (ahead > 0)
        return at, inside & (nearest > ahead * (1 - _HIDDEN))


def sample(picture: Tensor, at: Tensor) -> Tensor:
    """Read `[C, H, W]` at places `[H, W, 2]`, x and y in -1..1, between pixels."""
    read = F.grid_sample(
        picture[None].double(), at[None], padding_mode="border", align_corners=False
    )
    return read[0]


@dataclass(frozen=True)
class Consistency:
    """Whether frames show one rigid place.

    Attributes:
        photometric_db: PSNR of frames with those before, moved to where true depth and cameras
            say that what they show lies now, over the pixels that both see.
        geometric_px: how far patches lie from where they should, in pixels, mean over patches with
            a texture; None where there are none.
    """

    photometric_db: float
    geometric_px: float | None


def consistency(
    frames: Tensor, space: Space, *, gap: int = 4, first_generated: int = 0
) -> Consistency | None:
    """Say whether frames show one rigid place, by its true depth.

    Source: WBench's photometric and geometric consistency and WorldScore's reprojection error.
    Differ in: depth and cameras are given, not estimated, so that what is wrong is the video; one
    earlier frame is compared in place of all; decibels and pixels are not mapped to 0..1.

    Args:
        frames: the video `[F, C, H, W]` in 0..1, recorded frames included.
        space: of the same frames.
        gap: frames between the two that are compared; a chunk shows what its seam did.
        first_generated: frames before it are recorded, and not judged.

    Returns:
        None where no two frames see enough of the same.
    """
    frames = _of(frames, space)
    error, pixels = 0.0, 0
    shifts: list[Tensor] = []
    for frame in range(max(first_generated, gap), len(frames)):
        at, seen = space.seen_from(frame, frame - gap)
        if float(seen.double().mean()) < _SEEN_LEAST:
            continue
        moved, shown = sample(frames[frame - gap], at), frames[frame].double()
        error += float((moved - shown).square().mean(0)[seen].sum())
        pixels += int(seen.sum())
        shifts.append(_shifts(shown, moved, seen))
    if not pixels:
        return None
    mean = error / pixels
    found = torch.cat(shifts)
    return Consistency(
        CAP_DB if mean == 0 else min(CAP_DB, -10 * float(torch.tensor(mean).log10())),
        float(found.mean()) if len(found) else None,
    )


def _shifts(frame: Tensor, moved: Tensor, seen: Tensor) -> Tensor:
    """How far patches of a frame `[C, H, W]` lie from their places in `moved`, in pixels `[N]`."""
    around = _PATCH + 2 * _SEARCH
    rows, columns = frame.shape[1:]
    if rows < around or columns < around:
        return frame.new_zeros(0)
    inner = frame[:, _SEARCH : rows - _SEARCH, _SEARCH : columns - _SEARCH]
    there = _patches(moved, around)
    here = _patches(inner, _PATCH)
    whole = _patches(seen[None].double(), around).flatten(1).amin(1) > 0
    textured = (here - here.mean((2, 3), keepdim=True)).flatten(1).std(1) > _TEXTURE
    chosen = whole & textured
    return _displacement(here[chosen], there[chosen])


def _patches(picture: Tensor, side: int) -> Tensor:
    """Cut `[C, H, W]` into squares `[N, C, side, side]`, a patch's length apart."""
    return F.unfold(picture[None], side, stride=_PATCH)[0].T.view(-1, len(picture), side, side)


def _displacement(here: Tensor, there: Tensor) -> Tensor:
    """Length of the shift that fits patches `[N, C, P, P]` best into `[N, C, P + 2S, P + 2S]`."""
    if not len(here):
        return here.new_zeros(0)
    here = here - here.mean((2, 3), keepdim=True)
    costs = []
    steps = range(-_SEARCH, _SEARCH + 1)
    for down in steps:
        for right in steps:
            y, x = down + _SEARCH, right + _SEARCH
            cut = there[:, :, y : y + _PATCH, x : x + _PATCH]
            cut = cut - cut.mean((2, 3), keepdim=True)
            misfit = (here - cut).square().flatten(1).mean(1)
            costs.append(misfit + _SHIFT_COST * (down**2 + right**2))
    best = torch.stack(costs, 1).argmin(1)
    side = len(steps)
    offsets = torch.stack([best // side, best % side]) - _SEARCH
    return offsets.double().norm(dim=0)


def followed(frames: Tensor, space: Space, *, first_generated: int = 1) -> float | None:
    """Share of frames that moved as the camera was told to, in 0..1.

    Source: WorldRoamBench judges actions frame by frame, since a whole trajectory hides failures;
    GameWorldScore asks a network that was trained to name actions. Differs in: no network. The
    frame before, whose depth is known, is moved by -1 to 2 times the commanded motion, and what
    fits the frame best was made; between half and one and a half of what was asked counts as
    followed. A frozen picture follows nothing.

    Args:
        frames: the video `[F, C, H, W]` in 0..1, recorded frames included.
        space: of the same frames, with the commanded cameras.
        first_generated: frames before it are recorded, and not judged.

    Returns:
        None where the camera was never told to move, or nothing would show it.
    """
    frames = _of(frames, space)
    obeyed, asked = 0, 0
    for frame in range(max(first_generated, 1), len(frames)):
        share = _share(frames, space, frame)
        if share is not None:
            asked += 1
            obeyed += abs(share - 1) <= _OBEYED
    return obeyed / asked if asked else None


def _share(frames: Tensor, space: Space, frame: int) -> float | None:
    """How much of its commanded motion a frame made; None where that cannot be told."""
    motion = space.w2c[frame] @ inverted(space.w2c[frame - 1, None])[0]
    turn = _logarithm(motion[:3, :3])
    if float(turn.norm()) < _STILL and float(motion[:3, 3].norm()) < _STILL:
        return None
    points = space.rays() * space.depth[frame - 1][..., None]
    seen = torch.ones(points.shape[:2], dtype=torch.bool)
    fits = []
    for share in _SHARES:
        turned = torch.matrix_exp(share * turn)
        at, ahead = space.project(points @ turned.T + share * motion[:3, 3])
        seen &= (at.abs() < 1).all(-1) & (ahead > 0)
        fits.append((sample(frames[frame], at) - frames[frame - 1]).abs().mean(0))
    if float(seen.double().mean()) < _SEEN_LEAST:
        return None
    errors = torch.stack([fit[seen].mean() for fit in fits])
    if float(errors.max() - errors.min()) < _TELLING:
        return None
    return _SHARES[int(errors.argmin())]


def _logarithm(rotation: Tensor) -> Tensor:
    """Skew matrix `[3, 3]` whose exponential a rotation of less than half a turn is."""
    skew = (rotation - rotation.T) / 2
    sine = float(torch.stack([skew[2, 1], skew[0, 2], skew[1, 0]]).norm())
    if sine < 1e-9:
        return torch.zeros_like(skew)
    angle = float(torch.atan2(torch.tensor(sine), (rotation.trace() - 1) / 2))
    return skew * (angle / sine)


def _of(frames: Tensor, space: Space) -> Tensor:
    """Return frames that a space belongs to.

    Raises:
        ValueError: it belongs to others.
    """
    frames = checks.pictures(frames, "frames")
    if (len(frames), *frames.shape[2:]) != tuple(space.depth.shape):
        raise ValueError(
            f"depth must be of the frames, [F, H, W] of {list(frames.shape)}, got "
            f"{list(space.depth.shape)}; render it at the size of the frames"
        )
    return frames
