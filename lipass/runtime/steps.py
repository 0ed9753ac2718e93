"""Iterate over the denoising steps of a chunk, and hold what they keep for each other."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lipass.errors import LipassError
from lipass.grow import retimed
from lipass.passes.graph.marks import StepInputs
from lipass.policy.steps import PlannedStep
from lipass.runtime.levels import forms_of
from lipass.runtime.results import Miss, StepOutputs
from lipass.runtime.schedule import Schedule
from lipass.runtime.step import Step, StepState

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk


class StepSequence:
    """What `Chunk.steps` returns: each `for` over it is a loop of its own, which dies with it.

    `next(...)` and `len(...)` work too, as tqdm and hand-written loops need them.
    """

    def __init__(
        self,
        chunk: Chunk,
        sequence: tuple[PlannedStep, ...],
        schedule: Schedule,
    ) -> None:
        self._chunk = chunk
        self._sequence = sequence
        self._schedule = schedule
        self._begun: Generator[Step] | None = None

    def __len__(self) -> int:
        return len(self._sequence)

    def __iter__(self) -> Iterator[Step]:
        # Not kept here, so that `break` ends the loop although this object may live on.
        return self._go_on() if self._begun is not None else self._run()

    def __next__(self) -> Step:
        if self._begun is None:
            self._begun = self._run()
        return next(self._begun)

    def close(self) -> None:
        """End the loop that `next` has begun."""
        if self._begun is not None:
            self._begun.close()

    def _go_on(self) -> Iterator[Step]:
        assert self._begun is not None
        yield from self._begun

    def _run(self) -> Generator[Step]:
        loop = StepLoop(self._chunk)
        try:
            for place, planned in enumerate(self._sequence):
                # An output is kept only where the next step will ask for it.
                last = place + 1 == len(self._sequence)
                wanted = not last and self._sequence[place + 1].reused
                sigma = self._schedule.level(planned.index)
                timestep = self._schedule.timestep(planned.index)
                # Read only where outputs are kept or asked for.
                compared = wanted or planned.reused
                following = self._schedule.level(planned.next_index)
                forms = _forms(planned, sigma, timestep, following) if compared else ()
                state = StepState(loop, planned.index, forms, planned.reused, keeps=wanted)
                loop.take(state)
                self._chunk.active = state
                yield Step(
                    index=planned.index,
                    sigma=sigma,
                    sigma_next=following,
                    timestep=timestep,
                    reused=planned.reused,
                    coarse=planned.coarse,
                    state=state,
                )
        finally:
            loop.close()


class StepLoop:
    """One loop of steps while it runs; a chunk has one at a time, the latest.

    Attributes:
        chunk: the chunk it belongs to.
        calls: model calls that belonged to its steps.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.calls = 0
        self._outputs = StepOutputs()
        self._taken: StepState | None = None
        self._made: list[Any] = []
        self._partial = ""
        chunk.begin(self)

    def take(self, state: StepState) -> None:
        """Go on to a step; what an earlier computed step kept dies where this one computes.

        Raises:
            LipassError: the chunk has begun another loop.
        """
        if self.chunk.loop is None:
            self.chunk.begin(self)  # a step of a list is entered: its loop goes on
        if self.chunk.loop is not self:
            raise LipassError(
                f"a chunk has one loop of steps at a time, got step {state.index} of one that a "
                "newer chunk.steps(...) has replaced; finish a loop before the next begins"
            )
        if state is self._taken:
            return
        self._taken = state
        self._made.clear()
        if not state.reused:
            self._outputs.clear()

    def find(
        self,
        owner: object,
        branch: str,
        inputs: StepInputs,
        args: tuple[Any, ...],
        state: StepState,
    ) -> Any | Miss:
        """Return the kept output that answers a call, or say why none does."""
        if self.chunk.loop is not self:
            return Miss("its loop of steps is over")
        if self._partial:
            return Miss(self._partial)
        return self._outputs.find(owner, branch, inputs, args, state.index, state.level_forms)

    def keep(
        self,
        owner: object,
        branch: str,
        inputs: StepInputs,
        args: tuple[Any, ...],
        outputs: Any,
        state: StepState,
    ) -> None:
        """Keep the output of a call for the steps behind it."""
        if self.chunk.loop is not self:
            return
        if any(_lies_in(args[i], self._made) for i in inputs.latents):
            # A model that is compiled in parts would be half answered, half computed.
            self._partial = (
                "its input is what another compiled call of the step returned: one model call in "
                "several graphs; compile the whole model, without graph breaks"
            )
            self._outputs.clear()
            return
        self._made.append(outputs)
        self._outputs.keep(owner, branch, inputs, args, outputs, state.index, state.level_forms)

    def close(self) -> None:
        """Forget what this loop kept, and nothing else."""
        self._outputs.clear()
        self._made.clear()
        self.chunk.coarse.forget()
        self.chunk.end(self)


def _forms(
    planned: PlannedStep, sigma: Any, timestep: Any, following: Any
) -> tuple[float | None, ...]:
    """List what a model may be given for the level of a step, by `Step.velocity` or without it."""
    on_half = forms_of(retimed(sigma)[1] if planned.coarse else None)
    return (*forms_of(sigma, timestep, following), *on_half)


def _lies_in(given: Any, outputs: Any) -> bool:
    """Whether an input is in the memory of something that was returned."""
    if not isinstance(given, Tensor):
        return False
    if isinstance(outputs, Tensor):
        return outputs.data_ptr() == given.data_ptr() and outputs.device == given.device
    if isinstance(outputs, tuple | list):
        return any(_lies_in(given, one) for one in outputs)
    return False
