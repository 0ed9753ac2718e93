"""Check what a session is given for a chunk: how cameras are written, how many latents it has.

`chunk_latents` counts windows and clips of the history, in the session and in the graph. So chunks
must have that length, but for two: a first chunk without a history may have any, and a stream may
end with a shorter one. A shorter chunk is taken for the last; one that follows it is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lipass.config import Config
from lipass.policy.convention import Convention
from lipass.policy.plausibility import PoseCheck
from lipass.policy.views import check_poses
from lipass.runtime.agreement import tell

# Mean squares that no normalised latents have: VAEs without their scaling factor reach 30, pixels
# of a byte 10,000.
_FAINT, _LOUD = 1e-3, 16.0


class GivenChunks:
    """What the chunks of one session have been given so far."""

    def __init__(self, config: Config, convention: str) -> None:
        self.convention = Convention.parse(convention)
        self._strict = config.strict
        counts = config.context or config.steps
        # The adaptive rule for steps counts no chunks; the released gate counts clips.
        if config.context is None and config.steps and config.steps.mode == "adaptive":
            counts = None
        # Cameras of video frames; the gate itself knows how many a clip has.
        if any(o and o.mode == "matrix-game" for o in (config.context, config.steps)):
            counts = None
        self._length = counts.chunk_latents if counts else None
        self._last: dict[str, int] = {}
        self._planned: dict[str, int] = {}
        self._weighed = False
        view = config.context or config.steps
        self._check = None if view is None else PoseCheck(view, self.convention)

    def checked(
        self,
        poses: Tensor | None,
        query: Tensor | None,
        latents: Tensor | None,
        stream: str,
        index: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the cameras as OpenCV world-to-camera matrices; None where there are none.

        Raises:
            TypeError: cameras of the wrong kind.
            ValueError: cameras that are none or missing, or a chunk that is not `chunk_latents`
                long.
        """
        if query is None:
            if poses is None and (latents is not None or not index):
                return None, None
            raise ValueError(
                "query must hold the new latents' cameras, got None; pass [q, 4, 4], or, for a "
                "model without cameras, the history as latents=[M, ...] and no poses (nothing "
                "for a first chunk)"
            )
        poses = None if poses is None else self.convention.to_w2c(poses)
        query = self.convention.to_w2c(query)
        history, new = check_poses(poses, query)
        self.follow(len(history), len(new), stream, index)
        if self._check and (wrong := self._check.look(stream, history, new)):
            # Also under `strict`: a guess must not end a rollout.
            tell(wrong, strict=False)
        return history, new

    def follow(self, history: int, new: int, stream: str, index: int) -> None:
        """Take the length of a chunk; of one without cameras only its loop knows it.

        Raises:
            ValueError: it is not `chunk_latents`.
        """
        self._check_length(history, new, stream)
        self._planned[stream] = new if history or index else 0

    def weigh(self, power: float | None) -> None:
        """Tell once of latents that are not normalised: what compares them takes them to be.

        Args:
            power: mean square of the latest latents; None where none were read.
        """
        if power is None or self._weighed or power == 0 or _FAINT < power < _LOUD:
            return
        tell(
            f"latents must be normalised to a mean square of about 1, got {power:.3g}, so the "
            "window of the history is not what context.dynamics_low and dynamics_high say; divide "
            f"by {power**0.5:.3g}, as the VAE's scaling factor does, or pass latents=None",
            strict=self._strict,
        )
        self._weighed = True

    def finished(self, stream: str) -> None:
        """Remember the length of the chunk that was planned last."""
        self._last[stream] = self._planned.pop(stream, 0)

    def forget(self, stream: str) -> None:
        """Forget the lengths and the walk of a stream."""
        self._last.pop(stream, None)
        self._planned.pop(stream, None)
        if self._check is not None:
            self._check.walks.pop(stream, None)

    def state(self) -> dict[str, Any]:
        """Give what is remembered as plain data; `restore` takes it back."""
        walks = None if self._check is None else self._check.state()
        return {"last": dict(self._last), "weighed": self._weighed, "walks": walks}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given."""
        self._last, self._weighed = dict(state["last"]), state["weighed"]
        if self._check is not None:
            self._check.restore(state["walks"])

    def _check_length(self, history: int, new: int, stream: str) -> None:
        length, last = self._length, self._last.get(stream, 0)
        if length is None:
            return
        first = history == 0 and last == 0
        if (new > length and not first) or 0 < last < length:
            real = new if new > length else last
            raise ValueError(
                f"a chunk must have chunk_latents latents (a first one without history may "
                f"differ, the last may be shorter), got {real} for chunk_latents {length}; "
                f"set chunk_latents to {real}, in the session and in torch.compile"
            )
