"""Draw speed against quality as SVG, one large dot a preset and a small one a scene."""

from collections.abc import Iterator
from html import escape

from .columns import SAME_DB, scene_of, scene_title
from .palette import page_colour

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 280, 44, 40, 14, 70
_LABEL_PX, _LETTER_PX, _DOT_PX = 13.0, 6.6, 6


def scatter(rows: list[dict], key: str, label: str) -> str:
    """Return an SVG of `speedup_vs_off` against the decibels in `key`; rows need both."""
    rows = [
        row
        for row in rows
        if row.get("speedup_vs_off") is not None and (row.get(key) or SAME_DB) < SAME_DB
    ]
    if not rows:
        return ""
    speed = _axis([row["speedup_vs_off"] for row in rows] + [1.0], 0.5)
    quality = _axis([row[key] for row in rows], 2.0)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - speed[0]) / (speed[-1] - speed[0])
        up = (y - quality[0]) / (quality[-1] - quality[0])
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP),
        )

    parts = [f'<svg class="scatter" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    parts += _grid(speed, quality, at)
    parts.append(
        f'<text class="label" x="{_LEFT}" y="{_HEIGHT - 6}">speed-up over off</text>'
        f'<text class="label" transform="translate(11 {_HEIGHT - _BOTTOM}) rotate(-90)">'
        f"{escape(label)}</text>"
    )
    means = {}
    for preset in dict.fromkeys(row["preset"] for row in rows):
        own = [row for row in rows if row["preset"] == preset]
        for row in own:
            x, y = at(row["speedup_vs_off"], row[key])
            title = f"{preset}, {scene_title(scene_of(row))}: {row['speedup_vs_off']:.2f}x, "
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{page_colour(preset)}" '
                f'opacity=".45"><title>{escape(title)}{row[key]:.1f} dB</title></circle>'
            )
        means[preset] = at(
            sum(row["speedup_vs_off"] for row in own) / len(own),
            sum(row[key] for row in own) / len(own),
        )
    return "".join([*parts, *_labels(means), "</svg>"])


def _axis(values: list[float], step: float) -> list[float]:
    """Return ticks around the values, at most eight."""
    while (max(values) - min(values)) / step > 6:
        step *= 2
    first = (min(values) // step) * step
    count = int((max(values) - first) // step) + 2
    return [first + i * step for i in range(count)]


def _grid(speed: list[float], quality: list[float], at) -> list[str]:
    parts = []
    for tick in speed:
        x, y = at(tick, quality[0])
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">'
            f"{tick:g}x</text>"
        )
    for tick in quality:
        x, y = at(speed[0], tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{x - 5:.1f}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{tick:g}</text>"
        )
    return parts


def _labels(means: dict[str, tuple[float, float]]) -> list[str]:
    """Dots with their names, each in the nearest free place; on a thin line if that is far."""
    dots = [(x - _DOT_PX, y - _DOT_PX, x + _DOT_PX, y + _DOT_PX) for x, y in means.values()]
    taken: list[tuple[float, ...]] = list(dots)
    parts, leads = [], []
    for preset, (x, y) in sorted(means.items(), key=lambda item: item[1]):
        width = _LETTER_PX * len(preset)
        box = min(_places(x, y, width), key=lambda place: (_overlaps(place, taken), place[4]))
        taken.append(box[:4])
        if box[4] > _LABEL_PX:
            near = min(max(x, box[0]), box[2])
            edge = box[1] if box[1] > y else box[3]
            leads.append(
                f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{edge:.1f}"/>'
            )
        colour = page_colour(preset)
        parts.append(
            f'<circle class="mean" cx="{x:.1f}" cy="{y:.1f}" r="{_DOT_PX}" fill="{colour}"/>'
            f'<text class="name" x="{box[0]:.1f}" y="{box[3] - 3:.1f}" fill="{colour}">'
            f"{escape(preset)}</text>"
        )
    return leads + parts


def _places(x: float, y: float, width: float) -> Iterator[tuple[float, ...]]:
    """Yield boxes for a label around a dot: left, top, right, bottom, distance moved."""
    for moved in (0.0, *(step * _LABEL_PX for step in range(1, 7))):
        for top in dict.fromkeys((y - _LABEL_PX / 2 - moved, y - _LABEL_PX / 2 + moved)):
            for left in (x + 9, x - 9 - width, x - width / 2):
                if left > _LEFT and _TOP / 2 < top < _HEIGHT - _BOTTOM - _LABEL_PX:
                    yield left, top, left + width, top + _LABEL_PX, moved


def _overlaps(place: tuple[float, ...], taken: list[tuple[float, ...]]) -> int:
    return sum(
        place[0] < other[2] and other[0] < place[2] and place[1] < other[3] and other[1] < place[3]
        for other in taken
    )
