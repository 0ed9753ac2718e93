"""Hold one denoising step: what the sampler sees of it, what the compiled model asks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lipass.runtime.scope import branch_name, enter, leave

if TYPE_CHECKING:
    from lipass.session import Chunk


@dataclass(frozen=True)
class Step:
    """One denoising step, as the sampler sees it.

    Use it as `with step:` where the steps of several chunks are open at once, to say which of them
    the model is called for.

    Attributes:
        index: number in the full list of steps.
        sigma: noise level it starts from, an entry of the list that was passed; None where a
            scheduler has none.
        sigma_next: noise level it ends at.
        timestep: what a scheduler calls this step; None where none was passed.
        reused: the compiled model will answer with a stored output.
        state: what the compiled model reads.
    """

    index: int
    sigma: Any
    sigma_next: Any
    reused: bool
    state: StepState = field(repr=False, compare=False)
    timestep: Any = None

    def __enter__(self) -> Step:
        enter(self.state)
        return self

    def __exit__(self, *error: object) -> None:
        leave(self.state)


class StepState:
    """What the compiled model asks about the step it is called in.

    Calls are keyed by stream, region and their order within the step, so that two calls of one
    region (the branches of classifier-free guidance) never answer for each other.

    Attributes:
        chunk: the chunk it belongs to.
        index: number of the step.
        reused: answer with `lookup` instead of computing.
    """

    def __init__(self, chunk: Chunk, index: int, reused: bool, *, keeps: bool) -> None:
        self.chunk = chunk
        self.index = index
        self.reused = reused
        self._keeps = keeps
        self._calls: dict[tuple[str, str], int] = {}

    def lookup(self, region: str) -> Any | None:
        """Give the stored outputs of a region, or None where it has to compute.

        Each call stands for one call of the region. The outputs are copies.
        """
        if not self.reused:
            return None
        branch = branch_name(self.chunk.session)
        order = self._calls.get((branch, region), 0)
        outputs = self.chunk._stored.get((branch, region, order))
        if outputs is None:
            self.chunk.misses += 1
            return None
        self._calls[branch, region] = order + 1
        self.chunk.lookups += 1
        return _copy(outputs)

    def store(self, region: str, outputs: Any) -> None:
        """Keep a copy of the outputs of one call, where a later step will ask for them."""
        branch = branch_name(self.chunk.session)
        order = self._calls.get((branch, region), 0)
        self._calls[branch, region] = order + 1
        if self._keeps:
            self.chunk._stored[branch, region, order] = _copy(outputs)


def _copy(outputs: Any) -> Any:
    """Copy tensors inside tuples, lists and dicts: a caller may write into what it was given."""
    if isinstance(outputs, Tensor):
        return outputs.detach().clone()
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*map(_copy, outputs))
    if isinstance(outputs, tuple | list):
        return type(outputs)(map(_copy, outputs))
    if isinstance(outputs, dict):
        return {key: _copy(value) for key, value in outputs.items()}
    return outputs
