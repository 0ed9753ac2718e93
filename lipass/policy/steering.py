"""Walk a session's prompt from one text to another, and record for each chunk how far it is.

A change takes `over_chunks` chunks. In chunk k of n the new prompt has the weight `curve(k / n)`,
1 in the last. What the weight does is up to the policy:

    hard          nothing: the new prompt at once
    lerp          the texts are mixed, element by element
    slerp         the same on the sphere: directions turn, norms go straight
    two-prompt    attention reads both texts, with log(1 - weight) and log(weight) on their scores;
                  it goes on from latent to latent, and has arrived when the last chunk begins
    history-bias  the new prompt at once, and log(alpha) on the scores of what is older
    recache       the new prompt at once, and the latest latents are encoded anew under it
    flush         the new prompt at once, and of what is older only sink and newest stay

Source: what released systems do at a change of the prompt; the limits of each are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lipass.options import check, check_choice

POLICIES = ("hard", "lerp", "slerp", "two-prompt", "history-bias", "recache", "flush")
DEFAULT = "slerp"

Curve = Callable[[float], float] | Sequence[float]

# Of the history's weight before normalising, as the released live demos set it.
_ALPHA = 0.3
# What was blended before counts for less than a hundredth by then, a quarter new a chunk.
_DEPTH_MAX = 16


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

    policy: str = DEFAULT
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
        if _depth(self) >= _DEPTH_MAX:
            return self.new
        return self


def _depth(blend: Blend) -> int:
    return 1 + _depth(blend.old) if isinstance(blend.old, Blend) else 1


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def default_policy(attention_asks: bool) -> str:
    """Return the best policy that was measured, where attention can be told weights or cannot."""
    return "two-prompt" if attention_asks else DEFAULT
