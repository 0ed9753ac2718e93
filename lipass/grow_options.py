"""Say what early steps on half of the grid can be told, and refuse what they cannot be.

No defaults: those live in `lipass.presets`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lipass.options import check


@dataclass(frozen=True, kw_only=True)
class GrowOptions:
    """Early steps are computed on half of the grid along Y and X, by `Step.velocity`.

    With `delta` and `steps` both 0 none is.

    Attributes:
        delta: a step is on half of the grid where the frequencies that it lacks hold at most this
            share of signal at the level at which it ends; 0 is never. It needs `spectrum` and
            `grid`.
        spectrum: amplitude and exponent (A, beta) of the power of the latents' frequencies,
            `A * w ** -beta`, w in cycles along the shorter side; `lipass.grow.fit_spectrum` gives
            them.
        grid: latents of one frame along (Y, X), even ones.
        steps: so many first steps are on half of the grid, whatever they lack; in place of
            `delta`.
    """

    delta: float
    spectrum: tuple[float, float] | None
    grid: tuple[int, ...] | None
    steps: int

    def __post_init__(self) -> None:
        check(0 <= self.delta < 1, "grow.delta must be in [0, 1)", self.delta, "use 0.01")
        check(self.steps >= 0, "grow.steps must be >= 0", self.steps, "use 0 for none")
        check(
            not (self.delta and self.steps),
            "grow.delta and grow.steps must not both be given",
            (self.delta, self.steps),
            "leave one of them 0",
        )
        if self.spectrum is not None:
            amplitude, exponent = self.spectrum
            check(
                0 < amplitude < math.inf and 0 <= exponent < math.inf,
                "grow.spectrum must be an amplitude > 0 and an exponent >= 0",
                self.spectrum,
                "fit it with lipass.grow.fit_spectrum(latents)",
            )
        if self.grid is not None:
            check(
                len(self.grid) == 2 and min(self.grid) >= 2 and not any(n % 2 for n in self.grid),
                "grow.grid must be two even numbers of latents (Y, X)",
                self.grid,
                "pad the grid, or set 'grow': False",
            )
        for name in ("spectrum", "grid"):
            check(
                not self.delta or getattr(self, name) is not None,
                f"grow.delta needs grow.{name}",
                f"grow.delta {self.delta} without it",
                "give both, as docs/grow.md has it, or give grow.steps",
            )
