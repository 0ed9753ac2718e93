"""Draw what a preset did in each chunk: context, window, density, steps, seconds."""

from collections import Counter
from html import escape

from .palette import KINDS, kind_of

_COLUMN_PX, _LEFT_PX, _ROW_GAP_PX = 11, 50, 8
_CONTEXT_PX, _BAR_PX = 44, 22
_DOT_PX = 5.4


def timeline(rollout: dict, scale: dict[str, float], chunk_frames: int) -> str:
    """Return an SVG with one column a chunk.

    `scale` holds the maxima over all presets of the scene (`context`, `seconds`), so that bars can
    be compared between cards.
    """
    chunks = rollout["chunks"]
    steps_max = max((chunk.get("steps_total") or 0 for chunk in chunks), default=0)
    rows = [
        ("context", _CONTEXT_PX, lambda c, x, y: _context(c, x, y, scale["context"])),
        ("window", 12, _window),
        ("density", _BAR_PX, lambda c, x, y: _bar(c.get("density"), 1.0, x, y, "density")),
        ("steps", steps_max * _DOT_PX, _steps),
        (
            "seconds",
            _BAR_PX,
            lambda c, x, y: _bar(c.get("seconds"), scale["seconds"], x, y, "seconds"),
        ),
    ]
    y, parts = 4.0, []
    for label, height, draw in rows:
        if height == 0:
            continue
        parts.append(f'<text class="label" x="0" y="{y + height / 2 + 4:.1f}">{label}</text>')
        for i, chunk in enumerate(chunks):
            parts.append(draw(chunk, _LEFT_PX + i * _COLUMN_PX, y + height))
        y += height + _ROW_GAP_PX
    now = [
        f'<rect class="now" style="--lo:{i * chunk_frames};--hi:{(i + 1) * chunk_frames - 1}" '
        f'x="{_LEFT_PX + i * _COLUMN_PX - 1}" y="0" width="{_COLUMN_PX}" height="{y:.1f}"/>'
        for i in range(len(chunks))
    ]
    width = _LEFT_PX + len(chunks) * _COLUMN_PX
    return (
        f'<svg class="timeline" viewBox="0 0 {width} {y:.1f}" role="img" '
        f'style="max-width:{1.3 * width:.0f}px" '
        f'aria-label="chunks of {escape(rollout["preset"])}">'
        f"{''.join(now + parts)}</svg>"
    )


def _rect(kind: str, x: float, bottom: float, height: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x}" y="{bottom - height:.1f}" width="{_COLUMN_PX - 2}" '
        f'height="{height:.1f}"><title>{escape(title)}</title></rect>'
    )


def _context(chunk: dict, x: float, bottom: float, most: float) -> str:
    reasons = {int(frame): reason for frame, reason in chunk["reasons"].items()}
    counts = Counter(kind_of(reasons.get(frame, "")) for frame in chunk["context"])
    parts = []
    for kind in KINDS:
        height = counts[kind] / max(most, 1) * _CONTEXT_PX
        if height:
            share = f"{counts[kind]} of {len(chunk['context'])} latents"
            title = f"chunk {chunk['index']}: {share}, {kind}"
            parts.append(_rect(kind, x, bottom, height, title))
        bottom -= height
    return "".join(parts)


def _window(chunk: dict, x: float, bottom: float) -> str:
    if chunk.get("window_chunks") is None:
        return ""
    dynamics = chunk.get("dynamics")
    title = "" if dynamics is None else f"<title>latent dynamics {dynamics:.4f}</title>"
    return (
        f'<text class="value" x="{x + _COLUMN_PX / 2 - 1}" y="{bottom - 1}">'
        f"{chunk['window_chunks']}{title}</text>"
    )


def _bar(value: float | None, most: float, x: float, bottom: float, what: str) -> str:
    if value is None:
        return ""
    height = max(1.0, min(value / (most or 1), 1.0) * _BAR_PX)
    return _rect("amount", x, bottom, height, f"{what} {value:.3g}")


def _steps(chunk: dict, x: float, bottom: float) -> str:
    """Dots from the first step (top) to the last; hollow ones were reused.

    First and last steps always compute, so the reused ones are drawn in between.
    """
    total, computed = chunk.get("steps_total") or 0, chunk.get("steps_computed") or 0
    reused = range(computed - 1, total - 1)
    top = bottom - total * _DOT_PX
    return "".join(
        f'<circle class="{"reused" if step in reused else "computed"}" '
        f'cx="{x + _COLUMN_PX / 2 - 1}" cy="{top + (step + 0.5) * _DOT_PX:.1f}" r="1.9"/>'
        for step in range(total)
    )
