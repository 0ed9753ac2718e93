"""Bring cameras to world-to-camera matrices with OpenCV axes.

OpenCV's camera looks along +z with y down; OpenGL's looks along -z with y up. The two differ by a
turn of half a circle about x, on the camera's side of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_WORDS = {"w2c": "direction", "c2w": "direction", "opencv": "axes", "opengl": "axes"}
_HALF_TURN = (1.0, -1.0, -1.0, 1.0)


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
