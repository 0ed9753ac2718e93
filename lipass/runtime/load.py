"""Follow how much slower than foreseen a machine is, from one chunk to the next.

A machine that becomes slower is believed at once, as the next chunk is late too; one that becomes
faster is believed at the second chunk, as one alone may be luck. Between the two, the mean
follows slowly, and so does how far chunks lie from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What lies farther than this from the mean is no scatter of one load, but another load.
_JUMP = 1.25
_WEIGHT = 0.2
# Of a mean distance, where it is for which 19 of 20 chunks lie below, if they scatter normally.
_OF_THE_SCATTER = 2.0
_SCATTER_LEAST, _SCATTER_MOST = 0.01, 0.12


@dataclass
class Load:
    """Time measured over time foreseen.

    Attributes:
        level: of the chunks to come, mean; 1 is what was calibrated.
        scatter: mean distance from it, as a share.
        seen: chunks so far.
        below: the latest chunk, where it was so much faster that it may be luck; or None.
    """

    level: float = 1.0
    scatter: float = 0.03
    seen: int = 0
    below: float | None = None

    @property
    def high(self) -> float:
        """What 19 of 20 chunks stay below."""
        return self.level * (1 + _OF_THE_SCATTER * self.scatter)

    def add(self, ratio: float) -> None:
        """Note what a chunk took over what was foreseen."""
        self.seen += 1
        if self.seen == 1 or ratio > self.level * _JUMP:
            self.level, self.below = ratio, None
        elif ratio < self.level / _JUMP:
            if self.below is None:
                self.below = ratio
                return
            self.level, self.below = max(ratio, self.below), None
        else:
            self.below = None
            away = abs(ratio / self.level - 1)
            self.scatter += _WEIGHT * (away - self.scatter)
            self.scatter = min(max(self.scatter, _SCATTER_LEAST), _SCATTER_MOST)
            self.level += _WEIGHT * (ratio - self.level)

    def state(self) -> dict[str, Any]:
        """Give it as plain data; `Load(**state)` takes it back."""
        return asdict(self)
