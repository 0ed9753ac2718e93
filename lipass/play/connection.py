"""One socket: reads messages within limits, and sends chunks no faster than they are read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from lipass.errors import LipassError
from lipass.play.following import Following
from lipass.play.host import Host, Status
from lipass.play.protocol import Enter, Message, Refused, pack, read
from lipass.play.visitor import Visitor
from lipass.play.world import DENSE, FAST, Pixels

log = logging.getLogger(__name__)

# Chunks on their way to a visitor; one more is made only when one has left.
_CHUNKS_ON_THE_WAY = 4
_POLICY, _FAILED, _LATER = 1008, 1011, 1013


@dataclass(frozen=True)
class Limits:
    """Bounds of one connection.

    Attributes:
        messages_a_second: on average; twice as many may come at once.
        refusals: messages that may not be understood; one more closes it.
        enter_s: seconds until the first message.
        idle_s: seconds without a message until the visit ends.
        stall_s: seconds that sending one message may take.
    """

    messages_a_second: float = 60.0
    refusals: int = 20
    enter_s: float = 10.0
    idle_s: float = 300.0
    stall_s: float = 10.0


class _Closed(Exception):
    """The connection ends, with a code and a reason that the visitor is told."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


class Connection:
    """A visitor's socket from its first message to its end.

    Args:
        websocket: accepted.
        host: the world.
        limits: its bounds.
        knows: whether a token lets in.
    """

    def __init__(
        self, websocket: WebSocket, host: Host, limits: Limits, knows: Callable[[str], bool]
    ) -> None:
        self._socket, self._host, self._limits, self._knows = websocket, host, limits, knows
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | bytes | _Closed] = asyncio.Queue()
        self._on_the_way = 0
        self._counting = threading.Lock()
        self._allowance = 2 * limits.messages_a_second
        self._counted_at = time.monotonic()
        self._refusals = 0
        self._entering: asyncio.Future[Visitor | None] | None = None
        self._following: Following | None = None
        self._patience: asyncio.Timeout | None = None

    async def run(self) -> None:
        """Serve it until either side ends it."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await _cancelled(rest)
            for error in (task.exception() for task in done):
                if isinstance(error, _Closed):
                    await self._say_goodbye(error)
                elif error is not None and not isinstance(error, WebSocketDisconnect):
                    raise error
        finally:
            under_way = () if self._following is None else self._following.tasks()
            await _cancelled([*tasks, *under_way])
            # Who leaves while being let in has to be let out too.
            with contextlib.suppress(Exception):  # was told already
                visitor = await self._entering if self._entering is not None else None
                if visitor is not None:
                    await asyncio.to_thread(self._host.leave, visitor)

    def status(self, status: Status) -> None:
        """Tell what goes on; called in the loop."""
        self._queue.put_nowait(
            json.dumps({"do": "status", "ready": status.ready, "doing": status.doing})
        )

    # What lanes call, in their threads.

    def full(self) -> bool:
        """Whether enough chunks are on their way."""
        return self._on_the_way >= _CHUNKS_ON_THE_WAY

    def chunk(self, header: dict[str, Any], frames: Pixels) -> None:
        """Send a chunk."""
        with self._counting:
            self._on_the_way += 1
        self._post(pack(header, frames))

    def failed(self, why: str) -> None:
        """End the visit."""
        self._post(_Closed(_FAILED, why))

    def _post(self, item: bytes | _Closed) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self._limits.enter_s):
                message = await self._message()
        except TimeoutError:
            raise _Closed(_POLICY, "the first message must come at once") from None
        if not isinstance(message, Enter):
            raise _Closed(_POLICY, "the first message must be 'enter'")
        if not self._knows(message.token):
            raise _Closed(_POLICY, "the token is another one; use the address that was printed")
        self._entering = asyncio.ensure_future(asyncio.to_thread(self._host.enter, message, self))
        try:
            visitor = await asyncio.shield(self._entering)
        except LipassError as error:
            raise _Closed(_POLICY, str(error)) from None
        except Exception as error:
            log.exception("a visitor could not be let in")
            raise _Closed(_FAILED, f"{type(error).__name__} at the entrance") from None
        if visitor is None:
            raise _Closed(_LATER, f"{self._host.visitors_max} visitors are in; try again later")
        self._following = Following(self._host, visitor, self._tell, self._be_patient)
        self._welcome(visitor)
        self._host.begin(visitor)
        while True:
            try:
                async with asyncio.timeout(self._limits.idle_s) as self._patience:
                    message = await self._message()
            except TimeoutError:
                raise _Closed(1000, f"nothing came for {self._limits.idle_s:.0f} s") from None
            self._following.follow(message)

    def _be_patient(self) -> None:
        """Begin to wait anew: somebody spoke. An open microphone alone is nobody."""
        if self._patience is not None:
            with contextlib.suppress(RuntimeError):  # it is over just now
                self._patience.reschedule(self._loop.time() + self._limits.idle_s)

    async def _message(self) -> Message:
        """Wait for the next message that is understood."""
        while True:
            got = await self._socket.receive()
            if got["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(got.get("code", 1005))
            self._count()
            audio = got.get("bytes")
            if audio is not None and self._following is not None and self._following.listens:
                try:
                    self._following.hear(audio)
                except ValueError as why:
                    raise _Closed(_POLICY, str(why)) from None
                continue
            try:
                return read(got.get("text"), self._host.vocabulary)
            except Refused as why:
                self._refusals += 1
                if self._refusals > self._limits.refusals:
                    raise _Closed(_POLICY, "too many messages that are not understood") from None
                self._tell({"do": "refused", "why": str(why)})

    def _count(self) -> None:
        """Count a message against what may come a second."""
        now, rate = time.monotonic(), self._limits.messages_a_second
        self._allowance = min(2 * rate, self._allowance + (now - self._counted_at) * rate)
        self._counted_at = now
        self._allowance -= 1
        if self._allowance < 0:
            raise _Closed(_POLICY, f"at most {rate:.0f} messages a second are read")

    def _welcome(self, visitor: Visitor) -> None:
        """Say what there is to see and to say, then show the first view."""
        world = self._host.world
        self._tell(
            {
                "do": "welcome",
                "title": world.title,
                "room": visitor.room,
                "replica": self._host.name,
                "voice": self._host.voice is not None and not self._host.voice.failure,
                "films": self._host.films is not None,
                "ticket": visitor.ticket if visitor.can_be_kept else "",
                "said": visitor.said[0],
                "preset": visitor.said[1],
                "rooms": world.rooms,
                "entrance": world.room,
                "plan": visitor.plan,
                "words": {name: list(group) for name, group in world.words.items()},
                "presets": list(world.presets),
                "fps": world.fps,
                "chunk_frames": world.chunk_frames,
                "look": world.look,
                "beside": self._host.beside,
                "threads": self._host.threads,
            }
        )
        self.status(self._host.status)
        for side in (FAST, DENSE):
            header = {"do": "first", "side": side, "camera": visitor.camera}
            self._queue.put_nowait(pack(header, visitor.first[None]))

    def _tell(self, data: dict[str, Any]) -> None:
        self._queue.put_nowait(json.dumps(data, allow_nan=False))

    async def _write(self) -> None:
        while True:
            item = await self._queue.get()
            if isinstance(item, _Closed):
                raise item
            try:
                async with asyncio.timeout(self._limits.stall_s):
                    if isinstance(item, bytes):
                        await self._socket.send_bytes(item)
                    else:
                        await self._socket.send_text(item)
            except TimeoutError:
                raise _Closed(_POLICY, "chunks must be read while they come") from None
            if isinstance(item, bytes):
                with self._counting:
                    self._on_the_way = max(self._on_the_way - 1, 0)
                self._host.wake()

    async def _say_goodbye(self, closed: _Closed) -> None:
        with contextlib.suppress(Exception):  # who does not read does not hear it either
            async with asyncio.timeout(1.0):
                await self._socket.send_text(json.dumps({"do": "bye", "why": closed.why}))
                await self._socket.close(closed.code, closed.why)


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
