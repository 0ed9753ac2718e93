"""Draw a calibration: what was tried, and the frontier, quality over time, as one SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipass.calibration.calibrate import Calibration

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 60, 56
# A speed is written where no other one is so near.
_NAME = (40, 14)
_STYLE = """
svg { font: 12px system-ui, sans-serif; }
.ground { fill: #fff; } .axis { stroke: #bbb; } .grid { stroke: #eee; }
text { fill: #333; } .soft { fill: #777; } .end { text-anchor: end; } .mid { text-anchor: middle; }
.tried { fill: #bbb; } .part { fill: none; stroke: #ccc; } .front { fill: #5b3fd6; }
path { fill: none; }
.line { stroke: #5b3fd6; stroke-width: 1.5; } .default { fill: none; stroke: #5b3fd6; }
@media (prefers-color-scheme: dark) {
 .ground { fill: #14141a; } text { fill: #ddd; } .soft { fill: #999; } .axis { stroke: #555; }
 .grid { stroke: #26262e; } .tried { fill: #555; } .part { stroke: #444; }
 .front { fill: #a796ff; } .line, .default { stroke: #a796ff; }
}
"""


def picture(found: Calibration) -> str:
    """Return an SVG that stands alone."""
    points, tried = found.frontier.points, found.tried
    times = [one.chunk_ms for one in points] + [one["chunk_ms"] for one in tried]
    quality = [one.db for one in points] + [one["db"] for one in tried]
    across = _Axis(0.0, max(times), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(min(quality), max(quality), _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(across, up)]
    for trial in tried:
        kind, radius = ("tried", 3.0) if trial["whole"] else ("part", 2.5)
        parts.append(
            _dot(across(trial["chunk_ms"]), up(trial["db"]), radius, kind, trial["label"])
        )
    places = [(across(one.chunk_ms), up(one.db)) for one in points]
    path = " L ".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts.append(f'<path class="line" d="M {path}"/>')
    named: list[tuple[float, float]] = []
    for one, (x, y) in zip(points, places, strict=True):
        said = f"{one.name}: {one.chunk_ms:.1f} ms, {one.db:.1f} dB, worst {one.db_worst:.1f}"
        parts.append(_dot(x, y, 5.0, "front", said))
        if not any(abs(x - a) < _NAME[0] and abs(y - b) < _NAME[1] for a, b in named):
            named.append((x, y))
            parts.append(_text(x - 8, y - 8, f"{one.speedup:.2f}x", "end"))
        if one.name == found.frontier.default:
            parts.append(f'<circle class="default" cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
    told = f"{len(tried)} choices of options on {len(found.frontier.walks)} walks, "
    told += (
        f"{found.frontier.environment.get('device', '')}; dense {found.frontier.dense_ms:.1f} ms"
    )
    parts.append(_text(_LEFT, 20, told, ""))
    key = "blue: points, timed; circled: the default; grey: tried, foreseen; open: given up"
    parts.append(_text(_LEFT, 36, key, "soft"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="quality over time of a chunk">'
        f'<style>{_STYLE}</style><rect class="ground" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>\n"
    )


class _Axis:
    """Map values to pixels, from a round number to a round number."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        span = max(high - low, 1e-6)
        power = 10.0 ** math.floor(math.log10(span / 4))
        self.step = next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= 6)
        self.low = math.floor(low / self.step) * self.step
        self.high = math.ceil(high / self.step) * self.step
        self._begin, self._scale = begin, (end - begin) / max(self.high - self.low, 1e-6)

    def __call__(self, value: float) -> float:
        return self._begin + (value - self.low) * self._scale

    def marks(self) -> Iterator[float]:
        count = round((self.high - self.low) / self.step)
        return (self.low + n * self.step for n in range(count + 1))


def _axes(across: _Axis, up: _Axis) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in across.marks():
        x = across(value)
        yield f'<path class="grid" d="M {x:.1f} {_TOP} V {bottom}"/>'
        yield _text(x, bottom + 18, f"{value:g}", "soft mid")
    for value in up.marks():
        y = up(value)
        yield f'<path class="grid" d="M {_LEFT} {y:.1f} H {right}"/>'
        yield _text(_LEFT - 8, y + 4, f"{value:g}", "soft end")
    yield f'<path class="axis" d="M {_LEFT} {_TOP} V {bottom} H {right}"/>'
    yield _text(right, bottom + 38, "ms a chunk", "soft end")
    yield _text(_LEFT - 8, _TOP - 8, "dB", "soft end")


def _dot(x: float, y: float, radius: float, kind: str, told: str) -> str:
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"<title>{escape(told)}</title></circle>"
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
