"""Let ranks decide alike: the first one decides, and all see that they ask for the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from lipass.errors import LipassError
from lipass.parallel.ranks import Group, ranks_of
from lipass.policy.plan import ChunkPlan

Decision = dict[str, Any]


class Alone:
    """One process, which decides for itself.

    Attributes:
        group: of the ranks that decide together; None is this process alone.
    """

    group: Group | None = None

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Do something that all ranks do."""
        return contextlib.nullcontext()

    def plan(self, decide: Callable[[], ChunkPlan], **asked: object) -> ChunkPlan:
        """Return the plan of a chunk."""
        return decide()

    def number(self, decide: Callable[[], int], **asked: object) -> int:
        """Return a number that is decided."""
        return decide()


class Ranks(Alone):
    """The ranks that share a session: what the first one decides holds on all.

    What they ask for, plain data by name, has to be the same on all of them; that is one exchange.
    If a rank asks for something else or cannot ask, all of them raise, so that none waits for one
    that has given up.

    Args:
        group: a `torch.distributed.ProcessGroup`.
        options: what names the options of the session.

    Raises:
        LipassError: `torch.distributed` has not begun, or this process is not in the group.
    """

    def __init__(self, group: Group, options: str) -> None:
        self.group, self._options = group, options
        self._rank, self._count = ranks_of(group)
        self._told = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Tell the others where this rank fails before it could ask."""
        self._told = False
        try:
            yield
        except Exception as error:
            if not self._told:
                self._exchange({"failed": f"{type(error).__name__}: {error}"})
            raise

    def plan(self, decide: Callable[[], ChunkPlan], **asked: object) -> ChunkPlan:
        """Return the plan of the first rank.

        Raises:
            LipassError: a rank asks for something else, or cannot ask.
        """
        return ChunkPlan.from_dict(self._agree(asked, lambda: decide().to_dict()))

    def number(self, decide: Callable[[], int], **asked: object) -> int:
        """Return the number of the first rank; raises as `plan` does."""
        found: int = self._agree(asked, decide)
        return found

    def _agree(self, asked: dict[str, object], decide: Callable[[], Any]) -> Any:
        own: dict[str, Any] = {"asked": asked | {"options": self._options}}
        if self._rank == 0:
            own["decided"] = decide()
        said = self._exchange(own)
        for rank, one in enumerate(said):
            if "failed" in one:
                raise LipassError(
                    f"all ranks must go on together, got one that cannot, rank {rank}: "
                    f"{one['failed']}; mend what that rank is given"
                )
        for rank, one in enumerate(said):
            for name, value in own["asked"].items():
                if one["asked"].get(name) != value:
                    raise LipassError(
                        f"all ranks must ask for the same, got {name} {value!r} on rank "
                        f"{self._rank} and {one['asked'].get(name)!r} on rank {rank}; give all "
                        "ranks the same loop and options"
                    )
        return said[0]["decided"]

    def _exchange(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        self._told = True
        texts: list[Any] = [None] * self._count
        dist.all_gather_object(texts, json.dumps(own), group=self.group)
        return [json.loads(one) for one in texts]
