"""List what a calibration tries: for each subject a ladder of settings, from dear to cheap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lipass.config import Config

_SINK = (4, 2, 1, 0)
_MEMORY = (16, 12, 8, 6, 5, 4, 3, 2, 1, 0)
_WINDOW = (4, 3, 2, 1)
_OVERLAP = (0.1, 0.3, 0.5)
_REVISIT = (0.8, 0.65)
_SHARES = (0.75, 0.5, 0.33)


@dataclass(frozen=True)
class Setting:
    """One rung of a ladder.

    Attributes:
        label: a few words.
        options: flat ones.
    """

    label: str
    options: Mapping[str, Any] = field(hash=False)


Ladder = tuple[Setting, ...]


def ladders(config: Config, most_latents: int, steps: int) -> dict[str, Ladder]:
    """Return what sessions of a config can be told, by what it is about.

    Args:
        config: what is shared; a section that is off has no ladders.
        most_latents: most history latents that the dense loop reads in a chunk.
        steps: denoising steps of a chunk; 0 where the loop asks for none.
    """
    found = dict(_of_context(config, most_latents))
    if config.steps is not None and config.steps.mode == "adaptive" and steps > 2:
        found["steps"] = _of_steps(steps)
    return {name: ladder for name, ladder in found.items() if len(ladder) > 1}


def options_of(chosen: Mapping[str, Setting]) -> dict[str, Any]:
    """Put the options of settings together."""
    return {key: value for one in chosen.values() for key, value in one.options.items()}


def nearest(ladder: Ladder, config: Config) -> int:
    """Return the place of the rung that a config stands on, or of the nearest one."""
    flat = config.to_options()

    def away(place: int) -> float:
        total = 0.0
        for key, value in ladder[place].options.items():
            own = flat[key]
            numbers = isinstance(own, int | float) and isinstance(value, int | float)
            total += abs(own - value) if numbers else float(own != value)
        return total

    return min(range(len(ladder)), key=away)


def choice_of(
    found: Mapping[str, Ladder], shared: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the rungs that a point stands on, or those nearest to it.

    Args:
        found: ladders.
        shared: options of all points.
        options: of the point; what is of a section that is off here is left out.
    """
    on = Config.resolve(None, shared)
    options = {key: value for key, value in options.items() if getattr(on, key.partition(".")[0])}
    config = Config.resolve(None, {**shared, **options})

    def place(ladder: Ladder) -> int:
        # A window in latents is nearest to no window in chunks, whatever the config has of those.
        own = (i for i, one in enumerate(ladder) if one.options.items() <= options.items())
        return next(own, nearest(ladder, config))

    return tuple(place(ladder) for ladder in found.values())


def _of_context(config: Config, most: int) -> Iterator[tuple[str, Ladder]]:
    context = config.context
    if context is None or context.mode != "adaptive":
        return
    length = context.chunk_latents
    yield "sink", _rungs("sink", "context.sink_latents", _SINK)
    if context.memory_chunks is None:
        memory = tuple(n for n in _MEMORY if n <= max(most - length, 1))
        yield "memory", _rungs("memory", "context.memory_latents", memory)
    else:
        chunks = tuple(n for n in _MEMORY if n <= max(most // length, 1))
        yield "memory", _rungs("memory chunks", "context.memory_chunks", chunks)
    if context.window_latents is None:
        window = tuple(n for n in _WINDOW if n >= context.window_chunks_min)
        window = tuple(n for n in window if n * length <= max(most, length)) or window[-1:]
        ladder = _rungs("window", "context.window_chunks_max", window)
        if half := length // 2:
            # The newest latents are much alike, and what is before them is not.
            ladder += (Setting(f"window of {half} latents", {"context.window_latents": half}),)
        yield "window", ladder
    yield "overlap", _rungs("overlap", "context.overlap_min", _OVERLAP)


def _rungs(label: str, key: str, values: tuple[Any, ...]) -> Ladder:
    return tuple(Setting(f"{label} {value:g}", {key: value}) for value in values)


def _of_steps(steps: int) -> Ladder:
    """From all of them, over those of revisits, to few everywhere, spread evenly."""
    rungs = [Setting("all steps", {"steps.overlap_min": 1.0, "steps.reuse": ()})]
    rungs += [
        Setting(
            f"2 steps on revisits from {score:g}",
            {"steps.overlap_min": score, "steps.reuse": "middle"},
        )
        for score in _REVISIT
    ]
    counts = {max(3, round(share * steps)) for share in _SHARES} - {steps}
    for count in sorted(counts, reverse=True):
        kept = {round(i * (steps - 1) / (count - 1)) for i in range(count)}
        reuse = tuple(i for i in range(steps) if i not in kept)
        rungs.append(
            Setting(
                f"{steps - len(reuse)} steps", {"steps.overlap_min": 0.0, "steps.reuse": reuse}
            )
        )
    rungs.append(Setting("2 steps", {"steps.overlap_min": 0.0, "steps.reuse": "middle"}))
    return tuple(rungs)
