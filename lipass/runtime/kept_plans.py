"""Let block-sparse calls follow blocks that were chosen before, by an earlier layer or step.

Choosing blocks takes pooling, a product and a selection in each call. Layers that follow each
other may want the same blocks, and so may the denoising steps of a chunk, whose history does not
change: `sparse.plan_every` and `sparse.plan_once` say how far a choice reaches. Whatever plan a
call gets is right for its grids; only how well it was chosen differs, which the receipt's sampled
attention mass shows.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from lipass.kernels import registry
from lipass.kernels.call import Call
from lipass.kernels.estimate import capturing
from lipass.kernels.plan import BlockPlan
from lipass.runtime.scope import branch_name, current_step

if TYPE_CHECKING:
    from lipass.options import SparseOptions
    from lipass.runtime.chunk import Chunk

Make = Callable[[Call], BlockPlan]
Kind = tuple[object, ...]
"""What calls have in common whose plans fit each other."""


class KeptPlans:
    """The plans that calls of one compiled graph may follow."""

    def __init__(self, options: SparseOptions) -> None:
        self._every, self._once = options.plan_every, options.plan_once
        self._chunks: weakref.WeakKeyDictionary[Chunk, _OfChunk] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, options: SparseOptions | None) -> KeptPlans | None:
        """Return what keeps plans, or None where each call makes its own."""
        if options is None or (options.plan_every == 1 and not options.plan_once):
            return None
        return cls(options)

    def answering(self, chunk: Chunk | None) -> AbstractContextManager[None]:
        """Answer the calls of one run of the graph, in a chunk where there is one."""
        layers = _Layers(self._every)
        kept = None
        if self._once and chunk is not None and (step := current_step()) is not None:
            kept = self._chunks.setdefault(chunk, _OfChunk())
            kept.enter(step.index)

        def planned(call: Call, make: Make) -> tuple[BlockPlan, bool]:
            """Give a plan, and whether it is one that was made before."""
            if call.keep_frames is not None or call.latent_mask is not None:
                return make(call), False  # their plans hold what a mask says of this call
            place = None
            # A graph that is captured reads the same memory again, whoever's chunk it then is.
            if kept is not None and call.role == "decode" and not capturing():
                assert chunk is not None
                place = kept.place(_kind(call), call.site, branch_name(chunk.session))
                if (found := kept.plans.get(place)) is not None:
                    return found, True
            plan, follows = layers.planned(call, make)
            if kept is not None and place is not None:
                kept.plans[place] = plan
            return plan, follows

        return registry.answer("block_plan", planned)


class _OfChunk:
    """Plans of a chunk, by the place of their call among those of a step."""

    def __init__(self) -> None:
        self.plans: dict[Kind, BlockPlan] = {}
        self._step: int | None = None
        self._calls: Counter[Kind] = Counter()

    def enter(self, step: int) -> None:
        """Count from the first call again where a step begins."""
        if step != self._step:
            self._step = step
            self._calls.clear()

    def place(self, kind: Kind, site: str, branch: str) -> Kind:
        """Number a call: layers that share a graph have one site and are called in order."""
        same = (kind, site, branch)
        self._calls[same] += 1
        return (*same, self._calls[same])


class _Layers:
    """Plans of one run of a graph: of so many calls of a kind the first one chooses."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._calls: Counter[Kind] = Counter()
        self._latest: dict[Kind, BlockPlan] = {}

    def planned(self, call: Call, make: Make) -> tuple[BlockPlan, bool]:
        """Give the plan of a call, and whether an earlier layer made it."""
        # Blocks of like keys are other keys in each layer.
        if self._every == 1 or call.buckets is not None:
            return make(call), False
        kind = _kind(call)
        number = self._calls[kind]
        self._calls[kind] += 1
        if number % self._every:
            return self._latest[kind], True
        plan = self._latest[kind] = make(call)
        return plan, False


def _kind(call: Call) -> Kind:
    shape: torch.Size = call.q.shape
    return (
        call.role, shape, call.q.device, call.layout, call.q_grid, call.budget, call.planner,
        call.sink_latents,
    )  # fmt: skip
