"""Bring cameras to world-to-camera matrices with OpenCV axes, and notice those that are swapped.

OpenCV's camera looks along +z with y down; OpenGL's looks along -z with y up. The two differ by a
turn of half a circle about x, on the camera's side of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORDS = {"w2c": "direction", "c2w": "direction", "opencv": "axes", "opengl": "axes"}
_HALF_TURN = (1.0, -1.0, -1.0, 1.0)

# A walk that turns by less shows too little to tell the two readings apart.
_TURN_MIN_DEG = 30.0
# Share of a walk along the own view: people walk where they look, or straight back.
_WALK, _NO_WALK = 0.97, 0.85
# Of the unit of the poses: shorter ways are standing still.
_STILL = 1e-4


@dataclass(frozen=True)
class Convention:
    """How cameras are written.

    Attributes:
        direction: "w2c" or "c2w".
        axes: "opencv" or "opengl".
    """

    direction: str
    axes: str

    @classmethod
    def parse(cls, text: str) -> Convention:
        """Read such as "c2w", "w2c-opengl"; what is left out is w2c and opencv.

        Raises:
            ValueError: another word, or two of one kind.
        """
        words = text.lower().split("-") if isinstance(text, str) else [repr(text)]
        found = {_WORDS[word]: word for word in words if word in _WORDS}
        if len(found) != len(words):
            raise ValueError(
                "convention must be w2c or c2w and opencv or opengl, joined by a dash, got "
                f"{text!r}; write 'c2w-opengl'"
            )
        return cls(found.get("direction", "w2c"), found.get("axes", "opencv"))

    def __str__(self) -> str:
        return f"{self.direction}-{self.axes}"

    def to_w2c(self, cameras: Tensor) -> Tensor:
        """Convert `[M, 4, 4]`; what is no such tensor comes back as it is, to be refused."""
        if not isinstance(cameras, Tensor) or cameras.dim() != 3 or cameras.shape[1:] != (4, 4):
            return cameras
        if str(self) == "w2c-opencv" or not cameras.is_floating_point():
            return cameras
        cameras = cameras.double()
        if self.axes == "opengl":
            turn = cameras.new_tensor(_HALF_TURN)
            cameras = cameras * turn if self.direction == "c2w" else turn[:, None] * cameras
        return inverted(cameras) if self.direction == "c2w" else cameras

    def other(self) -> Convention:
        """Return the convention with the direction swapped."""
        return Convention("w2c" if self.direction == "c2w" else "c2w", self.axes)


def inverted(cameras: Tensor) -> Tensor:
    """Invert rigid matrices `[M, 4, 4]`, from their parts: scale stays visible to checks."""
    turned = cameras.clone()
    turned[:, :3, :3] = cameras[:, :3, :3].transpose(1, 2)
    turned[:, :3, 3] = -(turned[:, :3, :3] @ cameras[:, :3, 3:])[..., 0]
    return turned


def looks_swapped(w2c: Tensor) -> bool:
    """Whether a trajectory makes sense only if its matrices are camera to world.

    Read rightly, a walk goes along its own view while the view turns; read the other way round it
    does so only by chance. Standing, turning on the spot, orbits and straight walks say nothing.

    Args:
        w2c: `[M, 4, 4]` in order, checked, on the CPU.
    """
    if len(w2c) < 4:
        return False
    relative = w2c[1:, :3, :3] @ w2c[:-1, :3, :3].transpose(1, 2)
    cosine = (relative.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    if float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).sum()) < _TURN_MIN_DEG:
        return False
    as_given, swapped = _shares(w2c), _shares(inverted(w2c))
    if as_given is None or swapped is None:
        return False
    # One that strafes all the way keeps to one axis of its own, too.
    return float(swapped[2]) > _WALK and float(as_given.max()) < _NO_WALK


def _shares(w2c: Tensor) -> Tensor | None:
    """Shares `[3]` of a way that lead along the camera's own axes, or None where there is none."""
    centers = inverted(w2c)[:, :3, 3]
    steps = centers[1:] - centers[:-1]
    length = steps.norm(dim=1)
    moved = length > max(_STILL, 0.02 * float(length.max()))
    if not bool(moved.any()):
        return None
    # Controls turn in front of a step or behind it.
    before = (w2c[:-1, :3, :3] @ steps[:, :, None])[:, :, 0].abs()
    behind = (w2c[1:, :3, :3] @ steps[:, :, None])[:, :, 0].abs()
    return torch.maximum(before, behind)[moved].sum(0) / length[moved].sum()
