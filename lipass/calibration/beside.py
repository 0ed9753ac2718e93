"""Lay what somebody says over a frontier's options: what is said holds in all points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipass.calibration.frontier import Frontier
from lipass.config import SECTIONS, SHORTHANDS
from lipass.presets import PRESETS

# Who says one of the first means no more what a point says with the second.
_IN_PLACE_OF = (
    (("context.window_chunks_min", "context.window_chunks_max"), "context.window_latents"),
    (("context.memory_latents",), "context.memory_chunks"),
)


def beside(
    found: Frontier, options: Mapping[str, Any], name: str | None = None, mode: str | None = None
) -> dict[str, Any]:
    """Return flat options for `Config.resolve`: those of a point, and what is said over them.

    Of a section that is off, or that another preset has in another mode, the file says nothing.

    Args:
        found: what `lipass calibrate` has found.
        options: flat ones, as somebody has said them.
        name: of the point; None is the default.
        mode: preset, where it is said apart.
    """
    own = found.options_of(name)
    preset, before = mode or options.get("preset"), own.get("preset", "all")
    if preset is None or preset == before:
        preset = before
    else:
        own = {key: value for key, value in own.items() if key not in (*SECTIONS, "preset")}
    said = {target for key in options for target in SHORTHANDS.get(key, (key,))}
    said |= {instead for keys, instead in _IN_PLACE_OF if said & {*keys}}
    silent = [
        section
        for section in SECTIONS
        if not options.get(section, own.get(section, _mode(preset, section)))
        or (_mode(preset, section) or "adaptive") != (_mode(before, section) or "adaptive")
    ]
    kept = {
        key: value
        for key, value in own.items()
        if key not in said and key.partition(".")[0] not in silent
    }
    switches = {key: own[key] for key in SECTIONS if key in own}
    return {**kept, **switches, **options}


def _mode(preset: Any, section: str) -> str | None:
    """Name how a preset does a section; None where it does not."""
    own = PRESETS.get(preset, {}).get(section)
    return None if own is None else str(own.get("mode", "adaptive"))
