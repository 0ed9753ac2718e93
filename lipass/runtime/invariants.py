"""Keep what `hoist-calls` has taken out of a graph, while its inputs are as they were."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lipass.receipt import current_report

Compiled = Callable[..., Any]

# The branches of classifier-free guidance in two streams; each holds what one prompt gives.
_ENTRIES = 4


class InvariantStore:
    """What a session holds of all outlined bodies: the latest few results of each.

    They are kept for their inputs: the same objects, in the same memory, at the same version. A
    tensor that was written to, or made anew with equal values, computes again; so do tensors of
    `torch.inference_mode`, whose writes torch does not count. Nor does it count what is written
    through `Tensor.data`.

    Attributes:
        computed: runs of bodies.
        kept: calls that were answered without a run.
    """

    def __init__(self) -> None:
        self.computed = 0
        self.kept = 0
        self._entries: dict[Compiled, deque[tuple[_Inputs, Any]]] = {}

    def get(self, body: Compiled, args: tuple[Any, ...]) -> Any:
        """Return the results of a body for these inputs."""
        if any(isinstance(a, Tensor) and a.is_inference() for a in args):
            current_report().invariants_untold += 1
            return self._compute(body, args)
        entries = self._entries.setdefault(body, deque(maxlen=_ENTRIES))
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
        entries.append((_Inputs(args), outputs))
        return outputs

    def _compute(self, body: Compiled, args: tuple[Any, ...]) -> Any:
        self.computed += 1
        current_report().invariants_computed += 1
        return body(*args)

    def clear(self) -> None:
        """Forget all results; the counts stay."""
        self._entries.clear()


class _Inputs:
    """Remember inputs without keeping them alive."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._tensors = [weakref.ref(a) for a in args if isinstance(a, Tensor)]
        self._state = _state(args)

    def are(self, args: tuple[Any, ...]) -> bool:
        """Whether these are the same objects and nothing has written to them."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        same = all(ref() is a for ref, a in zip(self._tensors, tensors, strict=True))
        return same and self._state == _state(args)

    def gone(self) -> bool:
        """Whether one of them can not come again."""
        return any(ref() is None for ref in self._tensors)


def _state(args: tuple[Any, ...]) -> list[Any]:
    return [(a._version, a.data_ptr()) if isinstance(a, Tensor) else a for a in args]
