"""Hold what the streams of a session were told to show, and how far a change of it is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from lipass.errors import LipassError
from lipass.policy.blend import Blend
from lipass.policy.blending import check_blends, check_like, check_text, doubled, mixed, same
from lipass.policy.plan import ChunkPlan
from lipass.policy.steered_plan import steered
from lipass.policy.steering import Steering
from lipass.runtime.steering_scores import SteeringScores
from lipass.runtime.told import Change, Told
from lipass.switch import is_off

# The text of a chunk, those of what it remembers, and what they are mixed of.
_MADE_MAX = 8
# Texts that are held for what was made under them; beyond, the oldest memory counts as younger.
_RUNS_MAX = 64


class Prompts:
    """The prompts of one session, by stream.

    Args:
        recorded: whether plans say what chunks are made of, as in a replay.

    Attributes:
        scores: what attention is told.
    """

    def __init__(self, *, recorded: bool = False) -> None:
        self._told: dict[str, Told] = {}
        self._recorded = recorded
        self.scores = SteeringScores()

    def steer(self, text: Any, steering: Steering, stream: str, index: int) -> None:
        """Change the prompt of a stream from its chunk `index` on.

        Raises:
            TypeError: no text.
            ValueError: a text that does not fit the policy or the one before.
            LipassError: chunks were made, and nobody has said under which prompt.
        """
        told = self._told.get(stream)
        check_text(text)
        if steering.blends and not self._recorded:  # a replay mixes what its plans say
            check_blends(text, steering.policy)
        if told is None:
            if index and not self._recorded:
                raise LipassError(
                    "a change of the prompt needs the prompt before it, got none for the "
                    f"{index} chunks of stream {stream!r}; call session.steer(text) before the "
                    "first chunk, and pass chunk.text to the model"
                )
            told = self._told[stream] = Told()
        else:
            check_like(text, told.texts[told.count - 1])
        number, told.count = told.count, told.count + 1
        # Said again, it is the text that it was: what was made under it is known by the object.
        told.texts[number] = next((one for one in told.texts.values() if same(one, text)), text)
        told.change = Change(steering, _older(told), number, index)

    def count(self, stream: str) -> int:
        """Return how many texts a stream was told."""
        told = self._told.get(stream)
        return 0 if told is None else told.count

    def plan(self, plan: ChunkPlan, held: Sequence[int] | None = None) -> ChunkPlan:
        """Enter the prompt of a chunk into its plan, with what follows for context and steps."""
        told = self._told.get(plan.stream)
        if told is None or told.change is None:
            return plan
        change = told.change
        place = max(1, plan.index - change.first + 1)
        steering, count = change.steering, change.steering.over_chunks
        if change.old is None or place > count:
            kept = change.old if steering.policy == "two-prompt" else None
            blend = Blend(steering.policy, kept, change.new, since=change.since)
        else:
            since = plan.history_latents if place == 1 else change.since
            blend = Blend(
                steering.policy,
                change.old,
                change.new,
                steering.weights()[place - 1],
                place,
                count,
                steering.history_weight,
                since,
                before=steering.before(place),
            )
        return steered(
            plan,
            blend,
            steering,
            told.flushed,
            partial(_is_as_new, told),
            held,
            off=is_off(),
        )

    def text(self, plan: ChunkPlan) -> Any:
        """Return the text of a chunk; the same object as long as it is made of the same.

        Raises:
            LipassError: the stream was told none, or, in a replay, fewer than were recorded.
        """
        told, blend = self._of(plan)
        if not blend.doubled:
            return _text(told, blend)
        # While all is off nobody weighs two texts against each other.
        return told.texts[blend.new] if is_off() else _twice(told, _before(blend), blend.new)

    def memory(self, plan: ChunkPlan) -> list[tuple[Any, list[int]]]:
        """Return the context in runs, each with the text under which its latents were made.

        Raises:
            LipassError: as for `text`.
        """
        told, blend = self._of(plan)
        runs = _anew(told.runs, blend)
        groups = groupby(plan.context.indices, lambda latent: _made_under(runs, latent))
        return [
            (
                _twice(told, number, number)
                if blend.doubled and not is_off()
                else told.texts[number],
                list(latents),
            )
            for number, latents in groups
        ]

    def moved(self, kept: Sequence[int], stream: str = "main") -> None:
        """Follow a loop that drops latents from its history, so that the others move up.

        Args:
            kept: latents of the history, by their index so far, ascending.
            stream: name of the stream.
        """
        told = self._told.get(stream)
        if told is None:
            return

        def moved(latent: int) -> int:
            return bisect_left(kept, latent)

        runs = {moved(first): number for first, number in told.runs}
        told.runs = list(runs.items())
        told.flushed = [(moved(first), moved(last)) for first, last in told.flushed]
        if told.change is not None:
            told.change.since = moved(told.change.since)

    def finished(self, plan: ChunkPlan) -> None:
        """Remember what a chunk was made of, and how far the change was in it."""
        told, blend = self._told.get(plan.stream), plan.steering
        if told is None or blend is None:
            return
        told.runs = _anew(told.runs, blend)
        if told.runs[-1][1] != blend.main:
            told.runs.append((plan.history_latents, blend.main))
            if len(told.runs) > _RUNS_MAX:
                told.runs[:2] = [(0, told.runs[1][1])]
        if blend.flush is not None:
            told.flushed.append(blend.flush)
        change = told.change
        if change is not None and blend.new != change.new:
            # Said behind the plan of this chunk, which is what the change starts from.
            change.old, change.first = blend.as_old(), max(change.first, plan.index + 1)
        elif change is not None:
            change.blend, change.first = blend, min(change.first, plan.index)
            if blend.place == 1:
                change.since = blend.since
        self._forget(told)

    def forget(self, stream: str) -> None:
        """Forget the texts of a stream."""
        self._told.pop(stream, None)
        self.scores.forget(stream)

    def clear(self) -> None:
        """Forget all texts."""
        self._told.clear()
        self.scores.clear()

    def state(self) -> dict[str, Any]:
        """Give what was said as plain data and tensors; `restore` takes it back."""
        told = {stream: one.state() for stream, one in self._told.items()}
        return {"recorded": self._recorded, "told": told}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given; mixed texts are mixed again."""
        self._recorded = state["recorded"]
        self._told = {stream: Told.restored(one) for stream, one in state["told"].items()}

    def _of(self, plan: ChunkPlan) -> tuple[Told, Blend]:
        blend, told = plan.steering, self._told.get(plan.stream)
        if blend is None or told is None:
            raise LipassError(
                f"a chunk has a text where one was said, got none for stream {plan.stream!r}; "
                "call session.steer(text) before session.chunk(...)"
            )
        if missing := sorted(blend.numbers - told.texts.keys()):
            raise LipassError(
                f"a replay needs the texts that were said, got {told.count} of them for prompt "
                f"{missing[0]}; call session.steer(text) for each, in the order of the recording"
            )
        return told, blend

    def _forget(self, told: Told) -> None:
        """Drop texts that no later chunk is made of; a replay may ask for any."""
        if self._recorded or told.change is None:
            return
        change = told.change
        used = {change.new, *(number for _, number in told.runs)}
        for one in (change.old, change.blend):
            used |= one.numbers if isinstance(one, Blend) else set() if one is None else {one}
        told.texts = {number: text for number, text in told.texts.items() if number in used}


def _before(blend: Blend) -> int | Blend:
    """Return what a text of two prompts has in front; where there is one, it comes twice."""
    return blend.new if blend.old is None else blend.old


def _older(told: Told) -> int | Blend | None:
    """Return what the next change starts from."""
    change = told.change
    if change is None:
        return None
    if change.blend is not None:
        return change.blend.as_old()
    # No chunk was made since: what was said meanwhile was never shown.
    return change.new if change.old is None else change.old


def _anew(runs: list[tuple[int, int]], blend: Blend) -> list[tuple[int, int]]:
    """Return under which prompts the history counts as made, once some of it is encoded anew."""
    if not blend.recache:
        return runs
    first = blend.recache[0]
    before = [run for run in runs if run[0] < first]
    return [*before, (first, blend.new)]


def _made_under(runs: list[tuple[int, int]], latent: int) -> int:
    return next(number for first, number in reversed(runs) if first <= latent)


def _is_as_new(told: Told, latent: int) -> bool:
    """Whether a latent was made under the text that was said last, now or an earlier time."""
    assert told.change is not None
    new = told.change.new
    number = _made_under(told.runs, latent)
    return number == new or told.texts.get(number) is told.texts[new]


def _text(told: Told, blend: Blend | int) -> Any:
    if isinstance(blend, int):
        return told.texts[blend]
    new, old = told.texts[blend.new], blend.old
    if old is None or blend.weight == 1:
        return new
    key = (blend.policy == "slerp", old, blend.new, blend.weight)
    return _once(told, key, lambda: mixed(blend.policy, _text(told, old), new, blend.weight))


def _twice(told: Told, old: int | Blend, new: int) -> Any:
    make = lambda: doubled(_text(told, old), told.texts[new])  # noqa: E731
    return _once(told, ("both", old, new), make)


def _once(told: Told, key: Any, make: Callable[[], Any]) -> Any:
    """Mix a text where it was not made lately: what is kept of it is known by the object."""
    made = told.made.pop(key) if key in told.made else make()
    told.made[key] = made
    while len(told.made) > _MADE_MAX:
        told.made.pop(next(iter(told.made)))
    return made
