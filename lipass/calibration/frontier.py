"""Hold what a calibration has found: options between speed and quality, as one TOML file.

A frontier has what all of its points share, which graphs are compiled with, and points that
differ in options which sessions read chunk by chunk: so a session may go from one to another
without a compilation (`MOVABLE`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lipass.errors import LipassError

SCHEMA_VERSION = 1

MOVABLE = (
    *(
        f"context.{name}"
        for name in (
            "sink_latents", "memory_latents", "memory_chunks", "window_chunks_min",
            "window_chunks_max", "window_latents", "dynamics_low", "dynamics_high", "overlap_min",
            "gain_min",
            "departure_min",
        )
    ),
    "steps.overlap_min",
    "steps.departure_min",
    "steps.reuse",
)  # fmt: skip
"""Options that points may differ in: sessions read them for each chunk, graphs do not."""

_AGAIN = "run `lipass calibrate` again"
_LEAST = {"chunk_ms": 0.0, "speedup": 0.0, "latents": 0.0, "steps": 0.0}
_HEADER = """\
# Written by `lipass calibrate`; read by the option "frontier" of graphs and sessions.
# Milliseconds are those of the device below, dB those to the dense model on the walks below.
"""


@dataclass(frozen=True)
class Cost:
    """What a chunk takes that reads `n` latents and computes `k` steps, in milliseconds.

    `base_ms + latent_ms * n + k * (step_ms + step_latent_ms * n)`: encoding what is read, and
    steps that attend to it.
    """

    base_ms: float
    latent_ms: float = 0.0
    step_ms: float = 0.0
    step_latent_ms: float = 0.0

    def __post_init__(self) -> None:
        parts = [getattr(self, one.name) for one in dataclasses.fields(self)]
        for one, value in zip(dataclasses.fields(self), parts, strict=True):
            _check_number(one.name, "a cost", value, least=0.0)
        if not sum(parts):
            raise ValueError(f"a cost must have a part above 0, got none; {_AGAIN}")

    def ms(self, latents: float, steps: float) -> float:
        """Predict a chunk."""
        each = self.step_ms + self.step_latent_ms * latents
        return self.base_ms + self.latent_ms * latents + steps * each


@dataclass(frozen=True)
class Point:
    """Options, and what they cost and change; figures are those of the calibration.

    Attributes:
        name: of the point.
        options: flat ones, of `MOVABLE`.
        chunk_ms: median time of a chunk.
        speedup: how many times as fast as dense.
        db: to the dense model, mean over walks; what is above 60 counts as 60.
        db_worst: of the worst walk.
        latents: history latents that a chunk reads, mean.
        steps: denoising steps that a chunk computes, mean.
    """

    name: str
    options: Mapping[str, Any]
    chunk_ms: float
    speedup: float
    db: float
    db_worst: float
    latents: float
    steps: float

    def __post_init__(self) -> None:
        for key in self.options:
            if key not in MOVABLE:
                raise ValueError(
                    f"options of a point must be such that a session reads for each chunk, got "
                    f"{key!r} in {self.name!r}; move it to the table [options], which graphs read"
                )
        for one in ("chunk_ms", "speedup", "db", "db_worst", "latents", "steps"):
            _check_number(one, "a point", getattr(self, one), least=_LEAST.get(one))
        if not self.chunk_ms:
            raise ValueError(f"chunk_ms of a point must be above 0, got 0; {_AGAIN}")


@dataclass(frozen=True)
class Frontier:
    """What a calibration has found; `lipass calibrate` writes one.

    Attributes:
        options: flat ones that all points share, which graphs are compiled with.
        points: from the slowest, which is the best, to the fastest.
        cost: what chunks of the model take.
        default: name of the point that holds where no target is given.
        dense_ms: median time of a chunk of the dense model.
        model: mark of the model (`class`, `tensors`, `sha256`); empty where it has none.
        walks: names of the walks it was found on.
        environment: device, versions and how it was found.
    """

    options: Mapping[str, Any]
    points: tuple[Point, ...]
    cost: Cost
    default: str
    dense_ms: float
    model: Mapping[str, Any] = field(default_factory=dict)
    walks: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if not names or len({*names}) < len(names):
            raise ValueError(f"a frontier must have points of different names, got {names}; "
                             f"{_AGAIN}")  # fmt: skip
        if self.default not in names:
            raise ValueError(
                f"the default of a frontier must be one of its points, got {self.default!r}; "
                f"write one of {', '.join(names)}"
            )
        _check_number("dense_ms", "a frontier", self.dense_ms, least=0.0)
        # A point that somebody has added stands where its time puts it.
        ordered = sorted(self.points, key=lambda point: -point.chunk_ms)
        object.__setattr__(self, "points", tuple(ordered))

    def point(self, name: str | None = None) -> Point:
        """Return a point by its name; None is the default.

        Raises:
            ValueError: there is none of that name.
        """
        for point in self.points:
            if point.name == (self.default if name is None else name):
                return point
        known = ", ".join(point.name for point in self.points)
        raise ValueError(f"a point must be one of {known}, got {name!r}; see `lipass calibrate`")

    def options_of(self, name: str | None = None) -> dict[str, Any]:
        """Give the flat options of a point, for graph and session; None is the default."""
        return {**self.options, **self.point(name).options}

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `from_dict` takes it back."""
        data = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        tables = ("options", "model", "environment")
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: value for name, value in data.items() if name not in (*tables, "points")},
            "walks": list(self.walks),
            "cost": dataclasses.asdict(self.cost),
            **{name: _plain(data[name]) for name in tables},
            "points": [vars(one) | {"options": _plain(one.options)} for one in self.points],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Frontier:
        """Rebuild one from `to_dict`.

        Raises:
            ValueError: of another version, or something is missing or not understood.
        """
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"a frontier must have schema_version {SCHEMA_VERSION}, got "
                f"{data.get('schema_version')!r}; {_AGAIN}"
            )
        try:
            return cls(
                options=dict(_flat(data["options"])),
                points=tuple(
                    Point(**{**one, "options": dict(_flat(one["options"]))})
                    for one in data["points"]
                ),
                cost=Cost(**data["cost"]),
                default=data["default"],
                dense_ms=data["dense_ms"],
                model=dict(data.get("model", {})),
                walks=tuple(data.get("walks", ())),
                environment=dict(data.get("environment", {})),
            )
        except (LookupError, TypeError, AttributeError) as error:
            said = str(error).replace("__init__()", "it")
            raise ValueError(
                f"a frontier must be complete, got {type(error).__name__}: {said}; {_AGAIN}"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as TOML; a file of that name is replaced when the new one is whole.

        Raises:
            LipassError: `tomli_w` is not installed.
        """
        text = _HEADER + writer().dumps(self.to_dict())
        beside = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Frontier:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it is no TOML, or no frontier.
        """
        try:
            with Path(path).open("rb") as file:
                data = tomllib.load(file)
        except OSError as error:
            raise ValueError(
                f"a frontier must be a file, got {os.fspath(path)!r}: {error.strerror}; write one "
                "with `lipass calibrate`"
            ) from None
        except ValueError as error:  # of TOML or of UTF-8
            raise ValueError(
                f"a frontier must be TOML, got {os.fspath(path)!r}: {error}; {_AGAIN}"
            ) from None
        return cls.from_dict(data)


def undominated(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other is faster and closer than, from the best to the fastest."""
    kept: list[Point] = []
    for one in sorted(points, key=lambda one: (one.chunk_ms, -one.db)):
        if not kept or one.db > kept[-1].db:
            kept.append(one)
    return kept[::-1]


def writer() -> Any:
    """Return the module that writes TOML.

    Raises:
        LipassError: `tomli_w` is not installed.
    """
    try:
        import tomli_w
    except ImportError:
        raise LipassError(
            "writing a frontier needs tomli_w, and it is not installed; run pip install "
            "'lipass[calibrate]'"
        ) from None
    return tomli_w


def _check_number(name: str, of: str, value: Any, least: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} of {of} must be a number, got {value!r}; {_AGAIN}")
    if not math.isfinite(value):
        raise ValueError(f"{name} of {of} must be finite, got {value}; {_AGAIN}")
    if least is not None and value < least:
        raise ValueError(f"{name} of {of} must be >= {least:g}, got {value}; {_AGAIN}")


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Write tuples as lists; what is None is left out, as TOML has no word for it."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in options.items()
        if value is not None
    }


def _flat(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Give options by dotted names, however they are nested in the file."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, tuple(value) if isinstance(value, list) else value
