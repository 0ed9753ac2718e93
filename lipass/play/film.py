"""Films of visits: both pictures beside each other as mp4, made on the server, fetched once."""

from __future__ import annotations

import io
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lipass.play.world import Pixels

LONGEST_FRAMES = 2400
"""Two minutes of a person's walk."""
_SHOWN_PX, _GAP_PX = 256, 8
# Chunks that wait to be encoded; a film that is slower than its walk loses some.
_WAITING = 8
_KEPT, _KEPT_S, _KEPT_BYTES = 8, 120.0, 64 << 20


class Film:
    """One film while it is being made.

    Attributes:
        frames: of it.

    Args:
        fps: frames a second.
        thread: where it is encoded.
    """

    def __init__(self, fps: float, thread: ThreadPoolExecutor) -> None:
        self.frames = 0
        self._fps, self._thread = fps, thread
        self._file = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None
        self._waiting = threading.Semaphore(_WAITING)

    def add(self, left: Pixels, right: Pixels) -> None:
        """Show frames `[n, rows, columns, 3]` beside the newest of the other side."""
        if self.frames < LONGEST_FRAMES and self._waiting.acquire(blocking=False):
            self.frames += len(left)
            self._thread.submit(self._encode, left, right)

    def end(self) -> bytes:
        """Return the film; called in its thread."""
        if self._container is None:
            return b""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._file.getvalue()

    def _encode(self, left: Pixels, right: Pixels) -> None:
        import av

        self._waiting.release()
        for i, frame in enumerate(left):
            page = _beside(frame, right[min(i, len(right) - 1)])
            if self._container is None:
                self._container = av.open(self._file, "w", format="mp4")
                self._stream = self._container.add_stream("h264", round(self._fps))
                self._stream.width, self._stream.height = page.shape[1], page.shape[0]
                self._stream.pix_fmt = "yuv420p"
                self._stream.options = {"crf": "18", "preset": "veryfast"}
            shown = av.VideoFrame.from_ndarray(page, "rgb24")
            self._container.mux(self._stream.encode(shown))


class Films:
    """Films that are made, and those that wait to be fetched: a few, for a while.

    Args:
        fps: frames a second.
        clock: seconds.
    """

    def __init__(self, fps: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="lipass-play-film")
        self._fps, self._clock = fps, clock
        self._done: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> Film:
        """Begin a film."""
        return Film(self._fps, self.thread)

    def end(self, film: Film) -> str:
        """End a film, and return the ticket with which it is fetched; called in `thread`."""
        ticket, data = secrets.token_urlsafe(16), film.end()
        with self._lock:
            self._done[ticket] = self._clock(), data
            self._forget()
        return ticket

    def take(self, ticket: str) -> bytes | None:
        """Return a film and forget it; None for a ticket that is not known, or not any more."""
        with self._lock:
            self._forget()
            return self._done.pop(ticket, (0.0, None))[1]

    def close(self) -> None:
        """Make no more films."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _forget(self) -> None:
        total, now = sum(len(data) for _, data in self._done.values()), self._clock()
        for ticket, (at, data) in tuple(self._done.items()):
            few = len(self._done) <= _KEPT and total <= _KEPT_BYTES
            if few and now - at <= _KEPT_S:
                break
            total -= len(data)
            del self._done[ticket]


def _beside(left: Pixels, right: Pixels) -> Pixels:
    """Put two pictures beside each other, as large as they are looked at, pixels crisp."""
    times = max(1, _SHOWN_PX // left.shape[1])
    gap = np.full((left.shape[0] * times, _GAP_PX, 3), 255, np.uint8)
    page = np.concatenate([_larger(left, times), gap, _larger(right, times)], 1)
    # Colours are stored for two by two pixels.
    return np.ascontiguousarray(page[: page.shape[0] // 2 * 2, : page.shape[1] // 2 * 2])


def _larger(picture: Pixels, times: int) -> Pixels:
    return picture.repeat(times, 0).repeat(times, 1)
