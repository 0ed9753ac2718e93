"""Keep results between calls of the compiled model: the one place that does, by one rule.

- **Whose.** An entry belongs to one compiled graph with one set of parameters, and to the loop of
  steps of one chunk, or to a session. Nothing else finds it.
- **For which call.** A step's output answers a call whose inputs are the same, latents and noise
  level left out. Of several such outputs, those of other branches of the step, it is the one
  whose inputs distinguish it from the others as they do the call; where nothing does, none
  answers. What `hoist-calls` took out of a graph is kept for the same inputs, all of them.
- **Since when.** Outputs of the latest computed step answer, once a step each.
- **Written to.** What is kept is a copy, and so is what is handed out, unless nobody outside of
  the graph sees it.
- **Until when.** Outputs die with their loop: when it ends, is left, is replaced by another one or
  its chunk closes. Invariants die with their inputs or the session.

Where a graph holds the loop, the run of the graph keeps the output (`runtime.graph_loop`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor

from lipass.passes.graph.marks import StepInputs
from lipass.receipt import current_report
from lipass.runtime.inputs import Held, Watched
from lipass.runtime.levels import other_level

Compiled = Callable[..., Any]

# The branches of classifier-free guidance in two streams; each holds what one prompt gives.
_INVARIANTS_A_BODY = 4


class Miss(str):
    """Say why no kept output answers a call."""


@dataclass(eq=False)
class _Output:
    owner: object
    branch: str
    held: dict[int, Held]
    parameters: list[Tensor]
    states: list[tuple[int, int]]
    step: int
    level_forms: tuple[float | None, ...]
    value: Any
    answered: set[int] = field(default_factory=set)


class StepOutputs:
    """Outputs of the latest computed step of one loop of steps."""

    def __init__(self) -> None:
        self._kept: list[_Output] = []

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all: another step computes, or the loop is over."""
        self._kept.clear()

    def keep(
        self,
        owner: object,
        branch: str,
        inputs: StepInputs,
        args: Sequence[Any],
        value: Any,
        step: int,
        level_forms: tuple[float | None, ...],
    ) -> None:
        """Keep a copy of what a call of the graph `owner` returned.

        A call that computed in a reused step is kept where none like it is, so that what was not
        called in the step that computed is computed once.
        """
        if self._has_like(owner, branch, inputs, args, step):
            return
        places = (*inputs.conditions, *inputs.levels, *inputs.latents)
        parameters = [args[i] for i in inputs.parameters]
        self._kept.append(
            _Output(
                owner,
                branch,
                {i: Held(args[i]) for i in places},
                parameters,
                [_state(one) for one in parameters],
                step,
                level_forms,
                copy_of(value),
            )
        )

    def _has_like(
        self, owner: object, branch: str, inputs: StepInputs, args: Sequence[Any], step: int
    ) -> bool:
        """Whether an earlier step kept an output of a call like this one."""
        return any(
            one.owner is owner
            and one.branch == branch
            and one.step < step
            and _difference(one, inputs, args) is None
            for one in self._kept
        )

    def find(
        self,
        owner: object,
        branch: str,
        inputs: StepInputs,
        args: Sequence[Any],
        step: int,
        level_forms: tuple[float | None, ...],
    ) -> Any | Miss:
        """Return a copy of the output that answers a call in the given step, or say why not."""
        own = [one for one in self._kept if one.owner is owner and one.branch == branch]
        if not own:
            return Miss("nothing was computed for it in the step before")
        given = [args[i] for i in inputs.parameters]
        own = [one for one in own if _is_same_model(one, given)]
        if not own:
            return Miss("its weights are others than those of the step that computed")
        why = ""
        found = []
        for one in own:
            differs = _difference(one, inputs, args)
            if differs is None:
                found.append(one)
            why = why or differs or ""
        if not found:
            return Miss(why)
        found = [one for one in found if step not in one.answered]
        if not found:
            return Miss("the step that computed had fewer calls like it")
        chosen = _tell_apart(found, inputs, args)
        if chosen is None:
            return Miss(
                f"{len(found)} calls of the step that computed differ in latents or noise level "
                "only; name each with session.stream(...)"
            )
        named = [
            (inputs.names[i], held.given, args[i], held.is_same(args[i]))
            for i, held in ((i, chosen.held[i]) for i in inputs.levels)
        ]
        if other := other_level(chosen.level_forms, level_forms, named):
            return Miss(other)
        chosen.answered.add(step)
        return copy_of(chosen.value)


def _state(tensor: Any) -> tuple[int, int]:
    """Return what changes where torch counts a write, and where `.data` gets other memory."""
    if not isinstance(tensor, Tensor):
        return (-1, 0)
    return (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def _is_same_model(one: _Output, given: list[Any]) -> bool:
    return all(map(is_, one.parameters, given)) and one.states == [_state(x) for x in given]


def _difference(one: _Output, inputs: StepInputs, args: Sequence[Any]) -> str | None:
    """Name a condition in which a call differs, or latents of another form; None if nothing."""
    for i in inputs.conditions:
        if one.held[i].untold:
            return (
                f"its input {inputs.names[i]!r} was made in torch.inference_mode, where torch "
                "counts no writes; use torch.no_grad()"
            )
        if not one.held[i].is_same(args[i]):
            return f"its input {inputs.names[i]!r} is another than in the step that computed"
    for i in inputs.latents:
        if not one.held[i].has_kind_of(args[i]):
            return f"its input {inputs.names[i]!r} has another shape or dtype"
    if len(inputs.latents) > inputs.denoised:  # some condition the call, and cannot be told apart
        changed = [i for i in inputs.latents if not one.held[i].is_same(args[i])]
        if len(changed) > inputs.denoised:
            names = " and ".join(repr(inputs.names[i]) for i in changed)
            return f"its inputs {names} are others, and it denoises {inputs.denoised} of them"
    return None


def _tell_apart(found: list[_Output], inputs: StepInputs, args: Sequence[Any]) -> _Output | None:
    """Choose among branches of a step by those inputs in which they differ."""
    if len(found) == 1:
        return found[0]
    first, free = found[0], (*inputs.levels, *inputs.latents)
    telling = [
        i for i in free if not all(first.held[i].is_same(one.held[i].given) for one in found[1:])
    ]
    if not telling:
        return first  # the same call several times
    like = [one for one in found if all(one.held[i].is_same(args[i]) for i in telling)]
    return like[0] if len(like) == 1 else None


def copy_of(value: Any) -> Any:
    """Copy tensors inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copy_of, value))
    if isinstance(value, tuple | list):
        return type(value)(map(copy_of, value))
    if isinstance(value, dict):
        return {key: copy_of(one) for key, one in value.items()}
    return value


class Invariants:
    """What a session holds of the bodies that `hoist-calls` outlined: the latest few of each.

    Tensors of `torch.inference_mode`, whose writes torch does not count, compute in each call.

    Attributes:
        computed: runs of bodies.
        kept: calls that were answered without a run.
    """

    def __init__(self) -> None:
        self.computed = 0
        self.kept = 0
        self._kept: dict[Compiled, deque[tuple[Watched, Any]]] = {}

    def get(self, body: Compiled, args: tuple[Any, ...]) -> Any:
        """Return the results of a body for these inputs."""
        if any(isinstance(a, Tensor) and a.is_inference() for a in args):
            current_report().invariants_untold += 1
            return self._compute(body, args)
        entries = self._kept.setdefault(body, deque(maxlen=_INVARIANTS_A_BODY))
        for entry in tuple(entries):
            inputs, outputs = entry
            if inputs.are(args):
                self.kept += 1
                current_report().invariants_kept += 1
                return outputs
            if inputs.gone():
                with contextlib.suppress(ValueError):  # another thread has done it
                    entries.remove(entry)
        outputs = self._compute(body, args)
        entries.append((Watched(args), outputs))
        return outputs

    def _compute(self, body: Compiled, args: tuple[Any, ...]) -> Any:
        self.computed += 1
        current_report().invariants_computed += 1
        return body(*args)

    def clear(self) -> None:
        """Forget all results; the counts stay."""
        self._kept.clear()

    def state(self) -> dict[str, int]:
        """Give the counts: results belong to tensors of this process and are made again."""
        return {"computed": self.computed, "kept": self.kept}

    def restore(self, state: dict[str, int]) -> None:
        """Go on with counts of a `state`."""
        self.computed, self.kept = state["computed"], state["kept"]
