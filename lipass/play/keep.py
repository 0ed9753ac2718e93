"""Keep visits for who comes back: bytes of each part under a ticket, for a while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol


class Keeping(Protocol):
    """Where visits are kept; called by any thread."""

    def put(self, ticket: str, parts: dict[str, bytes]) -> None:
        """Keep parts of a visit in place of those it had; other parts stay."""

    def get(self, ticket: str) -> dict[str, bytes]:
        """Return the parts of a visit; none for a ticket that is not known any more."""


class Keep:
    """Visits in the memory of this process.

    Args:
        seconds: after which a visit is forgotten.
        most_bytes: of all visits; the oldest are forgotten first.
        clock: seconds.
    """

    def __init__(
        self,
        seconds: float = 600.0,
        most_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._most_bytes, self._clock = seconds, most_bytes, clock
        self._visits: OrderedDict[str, tuple[float, dict[str, bytes]]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visits)

    def put(self, ticket: str, parts: dict[str, bytes]) -> None:
        """Keep parts of a visit; see `Keeping`."""
        with self._lock:
            _, before = self._visits.pop(ticket, (0.0, {}))
            self._visits[ticket] = self._clock(), before | parts
            self._forget()

    def get(self, ticket: str) -> dict[str, bytes]:
        """Return the parts of a visit; see `Keeping`."""
        with self._lock:
            self._forget()
            return dict(self._visits.get(ticket, (0.0, {}))[1])

    def _forget(self) -> None:
        size = {ticket: sum(map(len, one.values())) for ticket, (_, one) in self._visits.items()}
        total, now = sum(size.values()), self._clock()
        for ticket, (at, _) in tuple(self._visits.items()):
            if now - at <= self._seconds and total <= self._most_bytes:
                break
            total -= size[ticket]
            del self._visits[ticket]
