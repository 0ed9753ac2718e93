"""Decide which denoising steps of a chunk compute and which reuse the last computed output.

The first and the last step always compute, whatever the options say. With the Euler rule `x +=
(sigma_next - sigma) * v` reusing a constant `v` over several steps telescopes: it is exactly the
sampler on the shorter list of sigmas. So the "merge" form drops the reused steps and stretches
the step before them; the "lookup" form keeps them all, for samplers with memory, and hands back
the stored output.

Source: Light Interaction reuses fixed indices, (1, 2) of HY-WorldPlay's 4 steps and 1 of
Matrix-Game's 3, in the lookup form. Differs in: with fewer steps those indices would reach the
last step; here it is protected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lipass.options import StepOptions


@dataclass(frozen=True)
class PlannedStep:
    """One step that the sampler takes.

    Attributes:
        index: number in the full list of steps.
        next_index: number of the step at whose sigma this one ends.
        reused: take the output of the last computed step instead of computing.
        coarse: on half of the grid.
    """

    index: int
    next_index: int
    reused: bool
    coarse: bool = False


@dataclass(frozen=True)
class StepPlan:
    """What happens to each of a chunk's denoising steps.

    Attributes:
        form: "merge" or "lookup".
        reused: indices of the steps that do not compute, ascending.
        reasons: per step of the full list, why it computes or not.
        coarse: indices of the steps that are taken on half of the grid, in the lookup form those
            among them that are reused; None until the noise levels are known.
    """

    form: str
    reused: tuple[int, ...]
    reasons: tuple[str, ...]
    coarse: tuple[int, ...] | None = None

    @property
    def total(self) -> int:
        """Steps of the full list."""
        return len(self.reasons)

    @property
    def computed(self) -> tuple[int, ...]:
        """Indices of the steps that compute, ascending."""
        reused = set(self.reused)
        return tuple(index for index in range(self.total) if index not in reused)

    def sequence(self) -> tuple[PlannedStep, ...]:
        """List the steps that the sampler takes, in order."""
        coarse = set(self.coarse or ())
        if self.form == "lookup":
            reused = set(self.reused)
            return tuple(
                PlannedStep(i, i + 1, i in reused, i in coarse) for i in range(self.total)
            )
        ends = (*self.computed[1:], self.total)
        return tuple(
            PlannedStep(i, end, False, i in coarse)
            for i, end in zip(self.computed, ends, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `from_dict` takes it back."""
        coarse = {} if self.coarse is None else {"coarse": list(self.coarse)}
        own = {"form": self.form, "reused": list(self.reused), "reasons": list(self.reasons)}
        return own | coarse

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepPlan:
        """Rebuild a plan from `to_dict`."""
        coarse = data.get("coarse")
        return cls(
            data["form"],
            tuple(data["reused"]),
            tuple(data["reasons"]),
            None if coarse is None else tuple(coarse),
        )


def plan_steps(total: int, options: StepOptions | None, *, allowed: bool, reason: str) -> StepPlan:
    """Decide which of `total` steps compute.

    Args:
        total: steps of the sampler, >= 1.
        options: None computes every step.
        allowed: the chunk may reuse steps (it revisits).
        reason: why it may or may not, for the report.

    Raises:
        ValueError: no steps.
    """
    if total < 1:
        raise ValueError(f"a chunk needs at least one denoising step, got {total}; pass sigmas")
    if options is None:
        return StepPlan("merge", (), ("computed: step policy is off",) * total)
    wanted = range(total) if options.reuse == "middle" else options.reuse
    reused, reasons = [], []
    for index in range(total):
        if index == 0:
            reasons.append("computed: first step")
        elif index == total - 1:
            reasons.append("computed: last step")
        elif not allowed:
            reasons.append(f"computed: {reason}")
        elif index not in wanted:
            reasons.append("computed: not in steps.reuse")
        else:
            reused.append(index)
            reasons.append(f"reused: {reason}")
    return StepPlan(options.form, tuple(reused), tuple(reasons))


def all_taken(plan: StepPlan, why_all: str | None = None) -> StepPlan:
    """Return the plan for a loop that takes each step itself, in the lookup form.

    Args:
        plan: which steps compute.
        why_all: why none may be reused; None keeps those of the plan.
    """
    if why_all is None:
        return replace(plan, form="lookup")
    reasons = tuple(
        f"computed: {why_all}" if index in plan.reused else reason
        for index, reason in enumerate(plan.reasons)
    )
    return StepPlan("lookup", (), reasons)
