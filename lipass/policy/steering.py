"""Walk a session's prompt from one text to another, and record for each chunk how far it is.

A change takes `over_chunks` chunks. In chunk k of n the new prompt has the weight `curve(k / n)`,
1 in the last. What the weight does is up to the policy:

    hard          nothing: the new prompt at once
    lerp          the texts are mixed, element by element
    slerp         the same on the sphere: directions turn, norms go straight
    two-prompt    attention reads both texts, with log(1 - weight) and log(weight) on their scores,
                  from latent to latent; all is new when the last chunk begins
    history-bias  the new prompt at once, and log(alpha) on the scores of what is older
    recache       the new prompt at once, and the latest latents are encoded anew under it
    flush         the new prompt at once, and of what is older only sink and newest stay

Source: what released systems do at a change of the prompt; the limits of each are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lipass.options import check, check_choice

POLICIES = ("hard", "lerp", "slerp", "two-prompt", "history-bias", "recache", "flush")

Curve = Callable[[float], float] | Sequence[float]

# Of the history's weight before normalising, as the released live demos set it.
_ALPHA = 0.3


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How a change of the prompt goes.

    Attributes:
        policy: one of `POLICIES`.
        over_chunks: chunks that the change takes; the last of them has the new prompt alone.
        curve: weight of the new prompt: a function of the share of the change that is done, in
            (0, 1], or one number a chunk. It stays in [0, 1], never falls and ends at 1. None is
            a straight line.
        alpha: what history from before the change weighs while it goes on, in (0, 1]: log(alpha)
            is added to its scores. None is 0.3 for "history-bias" and 1, nothing, for the others.
        recache_latents: latest latents that are encoded anew, for "recache".
        newest_latents: latest latents that "flush" keeps.
        sink_latents: first latents that "flush" and a growing window keep.
        grow_latents: while the change goes on, the latest latents that are read beside the sink,
            so many for each chunk of it; None reads as much as ever.
    """

    policy: str = "slerp"
    over_chunks: int = 4
    curve: Curve | None = None
    alpha: float | None = None
    recache_latents: int = 12
    newest_latents: int = 4
    sink_latents: int = 1
    grow_latents: int | None = None

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES)
        _check_count("over_chunks", self.over_chunks, 1)
        for name in ("recache_latents", "newest_latents"):
            _check_count(name, getattr(self, name), 1)
        _check_count("sink_latents", self.sink_latents, 0)
        if self.grow_latents is not None:
            _check_count("grow_latents", self.grow_latents, 1)
        if self.alpha is not None:
            check(
                isinstance(self.alpha, int | float) and 0 < self.alpha <= 1,
                "alpha must be in (0, 1]",
                self.alpha,
                "use 0.3; to read none of the older history, use policy 'flush'",
            )
        self.weights()

    @property
    def history_weight(self) -> float:
        """Alpha of this policy."""
        if self.alpha is not None:
            return float(self.alpha)
        return _ALPHA if self.policy == "history-bias" else 1.0

    @property
    def blends(self) -> bool:
        """Whether chunks of the change have weights in between."""
        return self.policy in ("lerp", "slerp", "two-prompt")

    @property
    def ramps(self) -> bool:
        """Whether weights go on within chunks, from latent to latent."""
        return self.policy == "two-prompt"

    def before(self, place: int) -> float | None:
        """Return the weight in front of a chunk from which it goes on within it, if it does.

        Args:
            place: which chunk of the change, from 1. The last has the new prompt alone.
        """
        if not self.ramps or place >= self.over_chunks:
            return None
        return self.weights()[place - 2] if place > 1 else 0.0

    def weights(self) -> tuple[float, ...]:
        """Return the weight of the new prompt in each chunk of the change, at its end.

        Raises:
            TypeError: a curve that is neither a function nor numbers.
            ValueError: of another length, outside of [0, 1], falling, or that does not end at 1.
        """
        if not self.blends:
            return (1.0,) * self.over_chunks
        told = tuple(self._told())
        last = 0.0
        for place, weight in enumerate(told, 1):
            rule = f"a curve must stay in [0, 1] and never fall, in chunk {place} of {len(told)}"
            check(last <= weight <= 1, rule, weight, _REMEDY)
            last = weight
        check(last == 1, "a curve must end at 1, the new prompt alone", last, _REMEDY)
        return told

    def _told(self) -> Iterator[float]:
        count, curve = self.over_chunks, self.curve
        # What ramps has arrived when its last chunk begins.
        steps = max(count - 1, 1) if self.ramps else count
        shares = [min(place / steps, 1.0) for place in range(1, count + 1)]
        if curve is None:
            yield from shares
        elif callable(curve):
            yield from (_number(curve(share)) for share in shares)
        elif isinstance(curve, Sequence) and not isinstance(curve, str):
            rule = f"a curve must have a weight for each of over_chunks {count} chunks"
            check(len(curve) == count, rule, list(curve), "add weights, or change over_chunks")
            yield from map(_number, curve)
        else:
            raise TypeError(
                f"a curve must be a function or a list of numbers, got {curve!r}; {_REMEDY}"
            )


_REMEDY = "use None for a straight line, or such as [0.1, 0.4, 0.8, 1.0]"


def _number(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"a curve must give numbers, got {given!r}; {_REMEDY}")
    return float(given)


def _check_count(name: str, given: object, least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be an int, got {given!r}; use {max(least, 4)}")
    check(given >= least, f"{name} must be >= {least}", given, f"use {max(least, 4)}")


def asked(policy: str | Steering | None, over_chunks: int, *, attention_asks: bool) -> Steering:
    """Return the change that is asked for; None is the best way that was measured."""
    if isinstance(policy, Steering):
        return policy
    best = "two-prompt" if attention_asks else "slerp"
    return Steering(policy=policy or best, over_chunks=over_chunks)
