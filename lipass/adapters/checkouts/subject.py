"""Say what an examination needs of a model: how to roll it out, and how to count what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from lipass.receipt import ChunkRecord
    from lipass.session import Session


class Rollout(Protocol):
    """A user's own loop over a model."""

    def __call__(
        self, model: Callable[..., Any], session: Session | None, chunks: int
    ) -> Iterator[Tensor]:
        """Yield the latents of each chunk, `[B, C, T, Y, X]`, as soon as it is done.

        The same noise for the same chunk in each call, whatever is left out; a copy of what the
        loop goes on writing to. Each chunk leaves its `with session.chunk(...)` before it is
        yielded.

        Args:
            model: the subject's model, or what `torch.compile` made of it.
            session: None is the loop as it was released: its own context, all steps.
            chunks: how many to generate.
        """
        ...


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen."""

    name: str
    holds: bool
    seen: str


@dataclass(frozen=True)
class Ran:
    """What one chunk makes a model do.

    Attributes:
        calls: calls of the model over latents: prefill, steps, refreshes of a cache.
        latents: latent frames that these took in, all together.
    """

    calls: int
    latents: int


@dataclass(frozen=True)
class Subject:
    """A small model of a family, random weights, on the CPU in fp32 and eval mode.

    Attributes:
        family: name of its adapter.
        model: what `lipass.adopt` is given and `rollout` calls.
        rollout: the loop as a user writes it.
        seen: latents that a call of the model took in, asked of each operator that ran with its
            name (`"aten::conv3d"`) and the shapes of its inputs; a number for exactly one operator
            a call, such as the embedding of patches, and None for all others.
        expected: what a chunk must have run if its record in the receipt is true.
        options: for backend and session, beside the preset: grid, tile, camera, ...
        pipeline: what `lipass.adopt` is given in place of the model where the rollout of the
            release is driven; its model is `model`.
        drive: that rollout: yields its chunks, or all of them at its end.
        drives_alike: whether they are those of `rollout`; if not, they are compared with what the
            same rollout gives when it is not driven.
        more: checks of this family alone.
        leaves_out: what `all` must leave out at least once: `"frames"` of earlier chunks,
            `"steps"` of views that are seen again, `"blocks"` of keys.
        stubbed: packages that the checkout imports, that are not here and are not needed to run.
    """

    family: str
    model: nn.Module
    rollout: Rollout
    seen: Callable[[str, Sequence[Sequence[int]]], int | None]
    expected: Callable[[ChunkRecord], Ran]
    options: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Any = None
    drive: Callable[[int], Iterable[Tensor]] | None = None
    drives_alike: bool = True
    more: Callable[[], Iterable[Check]] | None = None
    stubbed: tuple[str, ...] = ()
    leaves_out: frozenset[str] = frozenset({"frames", "steps", "blocks"})
