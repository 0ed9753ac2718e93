"""Say what the prompt of one chunk is made of, while it changes and behind that."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

# What was blended before counts for less than a hundredth by then, a quarter new a chunk.
_DEPTH_MAX = 16


@dataclass(frozen=True)
class Blend:
    """What the prompt of one chunk is made of; plain data, recorded in its plan.

    Prompts are numbered in the order in which a stream was given them.

    Attributes:
        policy: of the latest change.
        old: the prompt before: its number, what was made of several when a change began before
            the one before it was over, or None where there was none or nothing of it is left.
        new: number of the prompt that was given last.
        weight: of the new one, 0..1.
        place: which chunk of the change it is, from 1; 0 where none goes on.
        of: chunks of the change.
        alpha: weight of history from before the change.
        since: latents of the history from before the change.
        recache: history latents that are encoded anew before this chunk.
        flush: first and last latents, as for `range`, that are given up before this chunk.
        before: weight from which that of the new prompt goes on within the chunk, to `weight` in
            its last latent; None where all latents have one.
    """

    policy: str
    old: int | Blend | None
    new: int
    weight: float = 1.0
    place: int = 0
    of: int = 0
    alpha: float = 1.0
    since: int = 0
    recache: tuple[int, ...] = ()
    flush: tuple[int, int] | None = None
    before: float | None = None

    @property
    def changes(self) -> bool:
        """Whether the chunk is one of a change."""
        return self.place > 0

    @property
    def doubled(self) -> bool:
        """Whether the text of the chunk holds both prompts."""
        return self.policy == "two-prompt"

    @property
    def needs_attention(self) -> bool:
        """Whether scores of attention have to be told."""
        return self.alpha < 1 or self.doubled

    @property
    def numbers(self) -> set[int]:
        """Numbers of all prompts that it is made of."""
        older = self.old.numbers if isinstance(self.old, Blend) else {self.old}
        return {number for number in (self.new, *older) if number is not None}

    @property
    def main(self) -> int:
        """Number of the prompt under which a latent counts as made.

        It is the new one where nothing of the old is left: what shows some of the old still, and
        is remembered as the new, tells a model that the new looks so.
        """
        if self.old is None or self.weight == 1:
            return self.new
        return self.old.main if isinstance(self.old, Blend) else self.old

    @property
    def ramps(self) -> bool:
        """Whether the weight goes on within the chunk, from latent to latent."""
        return self.before is not None and self.before < self.weight

    @property
    def log_alpha(self) -> float:
        """What is added to scores of history from before the change."""
        return _log(self.alpha)

    def logs(self, latents: int = 1) -> tuple[list[float], list[float]]:
        """Return what is added to scores of the old text and of the new one, for each latent.

        Each has the weight of its middle; one row for all that of the middle of the chunk.
        """
        begin = self.weight if self.before is None else self.before
        shares = [(place + 0.5) / latents for place in range(latents)]
        weights = [begin + (self.weight - begin) * share for share in shares]
        return [_log(1 - weight) for weight in weights], [_log(weight) for weight in weights]

    def said(self) -> str:
        """Put it into a line for the receipt."""
        if not self.changes:
            return f"prompt {self.new}"
        parts = [f"prompt {self.new}: {self.policy}, chunk {self.place} of {self.of}"]
        if self.ramps:
            parts.append(f"weight {self.before:.2f} to {self.weight:.2f}")
        elif self.weight < 1:
            parts.append(f"weight {self.weight:.2f}")
        if self.alpha < 1:
            parts.append(f"{self.since} older latents weigh {self.alpha:g}")
        if self.recache:
            parts.append(f"{len(self.recache)} latents encoded anew")
        if self.flush:
            parts.append(f"latents {self.flush[0]} to {self.flush[1] - 1} given up")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `from_dict` takes it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Blend:
        """Rebuild a blend from `to_dict`."""
        old, flush = data["old"], data["flush"]
        return cls(
            **data
            | {
                "old": cls.from_dict(old) if isinstance(old, dict) else old,
                "recache": tuple(data["recache"]),
                "flush": None if flush is None else (flush[0], flush[1]),
            }
        )

    def as_old(self) -> int | Blend:
        """Return what the next change starts from."""
        if self.weight == 1 or self.old is None:
            return self.new
        return _cut(self, _DEPTH_MAX)


def _cut(blend: Blend, depth: int) -> Blend:
    """Leave the deepest blend of several out, and what was new in it whole."""
    if not isinstance(blend.old, Blend):
        return blend
    return replace(blend, old=_cut(blend.old, depth - 1) if depth > 2 else blend.old.new)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf
