"""Hold one denoising step: what the sampler sees of it, what the compiled model asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lipass.passes.graph.marks import StepInputs
from lipass.runtime.results import Miss
from lipass.runtime.scope import Block, branch_name, enter, latest, leave
from lipass.switch import is_off

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk
    from lipass.runtime.steps import StepLoop


@dataclass(frozen=True)
class Step:
    """One denoising step, as the sampler sees it.

    Use it as `with step:` where the steps of several chunks are open at once, to say which of them
    the model is called for; and where steps were taken as a list before the model was called.

    Attributes:
        index: number in the full list of steps.
        sigma: noise level it starts from, an entry of the list that was passed; None where a
            scheduler has none.
        sigma_next: noise level it ends at.
        timestep: what a scheduler calls this step; None where none was passed.
        reused: the compiled model will answer with a stored output.
        coarse: `velocity` will call the model on half of the grid.
        state: what the compiled model reads.
    """

    index: int
    sigma: Any
    sigma_next: Any
    reused: bool
    state: StepState = field(repr=False, compare=False)
    timestep: Any = None
    coarse: bool = False

    def velocity(self, call: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
        """Return the velocity of a state, on half of its grid where the plan says so.

        ::

            velocity = step.velocity(lambda x, sigma: model(x, sigma, cameras, cache), x)
            x = x + (step.sigma_next - step.sigma) * velocity

        Args:
            call: `(x, sigma)` to the velocity `noise - clean` of a state, of the shape of x. In
                steps on half of the grid x is `[B, .., Y/2, X/2]` and sigma another one than that
                of the step; positions are those of the centres of its cells, and the history
                stays (docs/grow.md).
            x: the state of the sampler `[B, .., Y, X]`.

        Raises:
            TypeError: a call that returns no tensor.
            ValueError: in a step on half of the grid: a state without planes, another grid than
                `grow.grid` or an odd one, or a velocity of another shape.
        """
        if not self.coarse or is_off():
            return call(x, self.sigma)
        return self.state.chunk.coarse.velocity(self, call, x)

    def __enter__(self) -> Step:
        self.state.enter()
        return self

    def __exit__(self, *error: object) -> None:
        self.state.leave()


class StepState:
    """What the compiled model asks about the step it is called in.

    Attributes:
        loop: the loop of steps it belongs to.
        index: number of the step.
        reused: answer with a kept output where one answers the call.
        level_forms: what the model may be given as the noise level of the step.
    """

    def __init__(
        self,
        loop: StepLoop,
        index: int,
        level_forms: tuple[float | None, ...],
        reused: bool,
        *,
        keeps: bool,
    ) -> None:
        self.loop = loop
        self.index = index
        self.level_forms = level_forms
        self.reused = reused
        self._keeps = keeps
        self._blocks: list[Block] = []

    @property
    def chunk(self) -> Chunk:
        """The chunk it belongs to."""
        return self.loop.chunk

    def call(
        self,
        owner: object,
        inputs: StepInputs,
        args: tuple[Any, ...],
        compute: Callable[[tuple[Any, ...]], Any],
    ) -> Any:
        """Answer a call of the graph `owner`, or compute it and keep it for the steps behind.

        Args:
            owner: what tells one compiled graph from another.
            inputs: what each of its inputs is.
            args: the inputs of this call.
            compute: runs the graph.
        """
        self.loop.calls += 1
        if not self.reused and not self._keeps:
            return compute(args)
        branch = branch_name(self.chunk.session)
        if self.reused:
            found = self.loop.find(owner, branch, inputs, args, self)
            if not isinstance(found, Miss):
                self.chunk.hit(self.index)
                return found
            self.chunk.miss(self.index, found)
        outputs = compute(args)
        if self._keeps:
            self.loop.keep(owner, branch, inputs, args, outputs, self)
        return outputs

    def enter(self) -> None:
        """Open a block in which calls belong to this step."""
        self.loop.take(self)
        block = Block(self.chunk.session, self.chunk, self)
        enter(block, depth=2)
        self._blocks.append(block)

    def leave(self) -> None:
        """Close the latest block."""
        block = latest(self._blocks)
        self._blocks.remove(block)
        leave(block)
