"""What `lipass play` was told, as plain data, and the host that it makes: here or in a replica."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from lipass.play.connection import Limits
from lipass.play.film import Films
from lipass.play.host import Host
from lipass.play.server import application
from lipass.play.voice import Voice
from lipass.play.world import World


@dataclass(frozen=True)
class Serving:
    """Who may come, and for how long.

    Attributes:
        visitors: at once, in one process.
        token: what a visitor has to know; "" lets everybody in.
        loopback: whether only names of this machine are answered.
        idle_s: seconds after which a visitor who does nothing is sent away.
        keep_s: seconds for which a visit that ended can be gone on with.
        threads: of one side; None shares the cores out.
        voice: whether words can be spoken, where pocketsphinx is installed.
        films: whether films are made, where PyAV is installed.
    """

    visitors: int = 16
    token: str = ""
    loopback: bool = True
    idle_s: float = 300.0
    keep_s: float = 600.0
    threads: int | None = None
    voice: bool = True
    films: bool = True

    def host(self, world: World, **options: Any) -> Host:
        """Make the host of a world; options are those of `Host`."""
        hears, films = self.voice and _is_there("pocketsphinx"), self.films and _is_there("av")
        return Host(
            world,
            self.visitors,
            threads=self.threads,
            voice=Voice(world.words) if hears else None,
            films=Films(world.fps) if films else None,
            **options,
        )

    def application(self, host: Host) -> Any:
        """Make the application of a host."""
        limits = Limits(idle_s=self.idle_s)
        return application(host, token=self.token, loopback=self.loopback, limits=limits)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
