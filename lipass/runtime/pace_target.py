"""Read what a session is told about options, a frontier and targets, or say what is wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from lipass.calibration.beside import beside
from lipass.calibration.frontier import Frontier
from lipass.config import Config
from lipass.runtime.agreement import tell
from lipass.runtime.pace import Pace


def opened(
    config: Config | None,
    options: Mapping[str, Any],
    frontier: str | os.PathLike[str] | Frontier | None,
    target_chunk_ms: float | None,
    target_db: float | None,
) -> tuple[Config, Pace | None]:
    """Return the options of a session, and its pace where it has a target.

    Args:
        config: resolved options; or None.
        options: flat ones; points of a frontier leave alone what they name.
        frontier: a file, or what is in it; None has no points.
        target_chunk_ms: what a chunk may take; or None.
        target_db: what a point must have had; or None.

    Raises:
        TypeError: a config beside options or a frontier, or arguments of another kind.
        ValueError: options or targets that are none, or a target without a frontier.
        LipassError: no point has reached a target, under `strict`.
    """
    if config is not None and not isinstance(config, Config):
        raise TypeError(
            f"config must be a lipass.Config, got {config!r}; write Session(preset='all')"
        )
    if config is not None and options:
        raise TypeError(
            f"a session takes a config or options, got both (options {sorted(options)}); "
            "put the options into Config.resolve"
        )
    ms = _checked("target_chunk_ms", target_chunk_ms, "milliseconds")
    db = _checked("target_db", target_db, "dB")
    if frontier is None and (ms is not None or db is not None):
        raise ValueError(
            "a target needs a frontier to choose from, got none; write one with `lipass "
            "calibrate`, and pass frontier='frontier.toml'"
        )
    found = _found(frontier)
    if found is None:
        return config or Config.resolve(None, options), None
    if config is not None:
        raise TypeError(
            "a session takes a config or a frontier, got both; give what differs from the file as "
            "options beside it"
        )
    config = Config.resolve(None, beside(found, options))
    if ms is None and db is None:
        return config, None
    configs = {
        point.name: Config.resolve(None, beside(found, options, point.name))
        for point in found.points
    }
    pace = Pace(found, configs, ms, db)
    _tell_reach(pace, config.strict)
    return config, pace


def _found(frontier: object) -> Frontier | None:
    if frontier is None or isinstance(frontier, Frontier):
        return frontier
    if not isinstance(frontier, str | os.PathLike):
        raise TypeError(
            f"frontier must be a path or a lipass.Frontier, got {type(frontier).__name__}; write "
            "frontier='frontier.toml'"
        )
    return Frontier.load(frontier)


def _checked(name: str, value: object, unit: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of {unit}, got {value!r}; write {name}=100")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{name} must be finite and above 0 {unit}, got {value}; write {name}=100"
        )
    return float(value)


def _tell_reach(pace: Pace, strict: bool) -> None:
    """Tell of a target that no point of the calibration has reached."""
    best, fastest = pace.points[0], pace.points[-1]
    if pace.target_db is not None and best.db < pace.target_db:
        tell(
            f"target_db must be reached by a point, got {pace.target_db:g} dB where the best, "
            f"{best.name!r}, had {best.db:.1f}; that one is taken: lower the target, or "
            "calibrate with more tries",
            strict=strict,
        )
    if pace.target_ms is not None and fastest.chunk_ms > pace.target_ms:
        pace.told_late = True
        tell(
            f"target_chunk_ms must be reached by a point, got {pace.target_ms:g} ms where the "
            f"fastest, {fastest.name!r}, took {fastest.chunk_ms:.0f}; that one is taken: raise "
            "the target, or calibrate on this device",
            strict=strict,
        )
