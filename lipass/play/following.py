"""Do what the messages of one visitor ask, once the visit has begun; lives in the event loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lipass.play.host import Host
from lipass.play.listening import Listening
from lipass.play.protocol import (
    Choose,
    Compare,
    Enter,
    Film,
    Fork,
    Listen,
    Message,
    Move,
    Recall,
    Say,
)
from lipass.play.visitor import Visitor
from lipass.play.world import Words

# A fork is a few megabytes, and kept for a while.
_FORK_S = 2.0


class Following:
    """What a visitor asks for.

    Args:
        host: of the visit.
        visitor: who asks.
        tell: gets what the visitor is told.
        spoke: is called when words were heard, which no message says.
    """

    def __init__(
        self,
        host: Host,
        visitor: Visitor,
        tell: Callable[[dict[str, Any]], None],
        spoke: Callable[[], None],
    ) -> None:
        self._host, self._visitor, self._tell, self._spoke = host, visitor, tell, spoke
        self._listening: Listening | None = None
        if host.voice is not None:
            refuse = partial(self._refuse, what="listen")
            self._listening = Listening(host.voice, self._say, tell, refuse)
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def follow(self, message: Message) -> None:
        """Do what a message asks."""
        if isinstance(message, Move):
            self._visitor.move(message)
        elif isinstance(message, Say):
            self._visitor.say(message)
        elif isinstance(message, Choose):
            self._visitor.choose(message)
        elif isinstance(message, Compare):
            self._visitor.compare(message)
        elif isinstance(message, Recall):
            walked = self._visitor.walked()
            self._tell({"do": "walk", "room": self._visitor.room, "walk": walked})
        elif isinstance(message, Enter):
            self._refuse("a visit has one room; open another socket")
        elif isinstance(message, Listen):
            self._listen(message.on)
        elif isinstance(message, Film):
            self._film(message.on)
        elif isinstance(message, Fork):
            self._fork()

    @property
    def listens(self) -> bool:
        """Whether bytes are audio: some are on their way when a microphone is switched off."""
        return self._listening is not None

    def hear(self, audio: bytes) -> None:
        """Take audio.

        Raises:
            ValueError: it comes faster than anybody speaks.
        """
        assert self._listening is not None
        self._listening.hear(audio)

    def tasks(self) -> Iterator[asyncio.Task[None]]:
        """List what is under way."""
        yield from self._under_way.values()
        if self._listening is not None:
            yield from self._listening.tasks

    def _say(self, words: Words) -> None:
        self._visitor.hear(words)
        self._spoke()

    def _refuse(self, why: str, what: str = "") -> None:
        """Say what is not done, so that its button does not look pressed."""
        self._tell({"do": "refused", "what": what, "why": why})

    def _listen(self, on: bool) -> None:
        if self._listening is None:
            if on:
                self._refuse("nobody listens here; see docs of lipass play", "listen")
        else:
            self._listening.switch(on)

    def _is_free(self, what: str) -> bool:
        """Whether nothing of a kind is under way that takes longer than a message."""
        task = self._under_way.get(what)
        if task is None or task.done():
            return True
        self._refuse(f"one {what} at a time; ask again in a moment", what)
        return False

    def _fork(self) -> None:
        """Keep the visit under a ticket of its own, when the chunks that are made now are."""
        if not self._visitor.can_be_kept:
            self._refuse("visits of this world do not go on elsewhere", "fork")
            return
        if not self._is_free("fork"):
            return

        async def keep() -> None:
            ticket = secrets.token_urlsafe(16)
            await asyncio.to_thread(self._host.store, self._visitor, ticket)
            self._tell({"do": "forked", "ticket": ticket})
            await asyncio.sleep(_FORK_S)

        self._under_way["fork"] = asyncio.create_task(keep())

    def _film(self, on: bool) -> None:
        """Begin a film, or end it and tell where it can be fetched, once."""
        films = self._host.films
        if films is None:
            self._refuse("no films are made here; see docs of lipass play", "film")
        elif on:
            if self._is_free("film"):
                self._visitor.film = films.begin()
        elif (film := self._visitor.film) is not None:
            self._visitor.film = None

            async def develop() -> None:
                loop = asyncio.get_running_loop()
                ticket = await loop.run_in_executor(films.thread, films.end, film)
                self._tell({"do": "film", "ticket": ticket, "frames": film.frames})

            self._under_way["film"] = asyncio.create_task(develop())
