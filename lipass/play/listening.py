"""Listen to one visitor: audio in, no faster than somebody speaks, and words to the visit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from lipass.errors import LipassError
from lipass.play.voice import RATE, Ear, Voice
from lipass.play.world import Words

log = logging.getLogger(__name__)

# Audio may come in bursts of three seconds; who speaks on while two utterances wait is not heard.
_FASTEST, _BURST, _UTTERANCES = 1.5 * 2 * RATE, 3 * 2 * RATE, 2


class Listening:
    """What a visitor says while the microphone is on; lives in the event loop.

    Attributes:
        tasks: utterances that are being understood.

    Args:
        voice: of the host.
        say: gets words of the world.
        tell: gets what the visitor is told.
        refuse: gets why nobody is heard.
    """

    def __init__(
        self,
        voice: Voice,
        say: Callable[[Words], None],
        tell: Callable[[dict[str, Any]], None],
        refuse: Callable[[str], None],
    ) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self._voice, self._say, self._tell, self._refuse = voice, say, tell, refuse
        self._ear: Ear | None = None
        self._allowance, self._at = float(_BURST), time.monotonic()

    def switch(self, on: bool) -> None:
        """Begin to listen, or forget what was heard so far."""
        self._ear = None
        if not on:
            return
        if self._voice.failure:
            self._refuse(self._voice.failure)
            return
        try:
            self._ear = Ear()
        except LipassError as error:
            self._refuse(str(error))

    def hear(self, audio: bytes) -> None:
        """Take audio, and understand what has been said to its end; unless on, it is dropped.

        Raises:
            ValueError: it comes faster than anybody speaks.
        """
        now = time.monotonic()
        allowed = self._allowance + (now - self._at) * _FASTEST
        self._allowance, self._at = min(_BURST, allowed) - len(audio), now
        if self._allowance < 0:
            raise ValueError("audio must come no faster than it is spoken")
        for pcm in [] if self._ear is None else self._ear.hear(audio):
            self.tasks = {one for one in self.tasks if not one.done()}
            if len(self.tasks) < _UTTERANCES:
                self.tasks.add(asyncio.create_task(self._understand(pcm)))

    async def _understand(self, pcm: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            heard = await loop.run_in_executor(self._voice.thread, self._voice.hear, pcm)
        except LipassError as error:
            self._give_up(str(error))
            return
        except Exception as error:
            log.exception("an utterance could not be understood")
            self._give_up(f"{type(error).__name__} while listening; speak again")
            return
        if heard.words:
            self._say(heard.words)
        self._tell({"do": "heard", "text": heard.text, "words": heard.words})

    def _give_up(self, why: str) -> None:
        """Say once that nobody is heard: what comes from an open microphone is dropped."""
        if self._ear is not None:
            self._ear = None
            self._refuse(why)
