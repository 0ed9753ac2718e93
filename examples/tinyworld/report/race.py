"""Show two rollouts at the speed at which they were made, beside each other, as a GIF."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .palette import preset_colour

RACERS = {"off": "torch.compile alone", "all": "with lipass, preset all"}
# A race that takes longer is played faster; the time that it shows is the real one.
LONGEST_S = 6.0
_TICK_S, _HOLD_S = 0.04, 2.0
_TILE_PX, _GAP_PX, _TOP_PX, _BOTTOM_PX = 300, 12, 30, 40
_PAPER, _INK, _SOFT, _TRACK = (250, 250, 248), (28, 32, 36), (96, 100, 108), (227, 228, 232)


def race(films: dict[str, np.ndarray], seconds: dict[str, list[float]], path: Path) -> Path:
    """Write a GIF in which a frame is seen from when its chunk would have been done.

    Args:
        films: `uint8 [F, H, W, 3]` by preset; those of `RACERS` are shown.
        seconds: of each chunk of a preset, in their order.
        path: of the GIF.
    """
    ends = {name: np.cumsum(seconds[name]) for name in RACERS}
    slowest_s = max(end[-1] for end in ends.values())
    faster = max(1.0, slowest_s / LONGEST_S)
    ticks = int(np.ceil(slowest_s / faster / _TICK_S)) + 1
    pages = []
    for tick in range(ticks):
        now_s = tick * _TICK_S * faster
        canvas, draw = _paper()
        for column, (name, title) in enumerate(RACERS.items()):
            done = frames_done(ends[name], now_s, len(films[name]))
            _panel(canvas, draw, column, films[name][max(done - 1, 0)])
            share = done / len(films[name])
            _caption(draw, column, name, title, share, _told(ends, name, now_s))
        pages.append(canvas)
    # One palette for all frames: with one each, still parts would flicker and be stored anew.
    some = [np.asarray(page) for page in pages[:: max(1, ticks // 8)]]
    palette = Image.fromarray(np.concatenate(some)).quantize(256, Image.Quantize.MEDIANCUT)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    shown_ms = [round(_TICK_S * 1000)] * (len(pages) - 1) + [round(_HOLD_S * 1000)]
    pages[0].save(
        path, save_all=True, append_images=pages[1:], duration=shown_ms, loop=0, optimize=True
    )
    return path


def frames_done(ends_s: np.ndarray, now_s: float, frames: int) -> int:
    """Count the frames to be seen: those of a chunk one after the other while the next is made.

    A chunk is there as a whole when it is done; shown at once, four frames would be one.
    """
    edges_s = np.concatenate([[0.0], ends_s])
    share = np.interp(now_s, edges_s, np.arange(len(edges_s))) / len(ends_s)
    return int(share * frames + 1e-9)


def _told(ends: dict[str, np.ndarray], name: str, now_s: float) -> str:
    took_s, slowest_s = ends[name][-1], max(end[-1] for end in ends.values())
    if now_s < took_s:
        return f"{now_s:.1f} s"
    faster = slowest_s / took_s
    return f"{took_s:.1f} s" + (f", {faster:.1f}x faster" if faster > 1 else "")


def _paper() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    width = len(RACERS) * (_TILE_PX + _GAP_PX) + _GAP_PX
    canvas = Image.new("RGB", (width, _TOP_PX + _TILE_PX + _BOTTOM_PX), _PAPER)
    return canvas, ImageDraw.Draw(canvas)


def _panel(canvas: Image.Image, draw: ImageDraw.ImageDraw, column: int, frame: np.ndarray) -> None:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    tile = picture.resize((_TILE_PX, _TILE_PX), Image.Resampling.BICUBIC)
    canvas.paste(tile, (_GAP_PX + column * (_TILE_PX + _GAP_PX), _TOP_PX))


def _caption(
    draw: ImageDraw.ImageDraw, column: int, name: str, title: str, share: float, told: str
) -> None:
    left = _GAP_PX + column * (_TILE_PX + _GAP_PX)
    right, bar = left + _TILE_PX, _TOP_PX + _TILE_PX + 6
    draw.text((left, 7), title, _INK, ImageFont.load_default(15))
    font = ImageFont.load_default(14)
    draw.text((left, bar + 11), f"{share:.0%} of the frames", _SOFT, font)
    draw.text((right, bar + 11), told, _INK if share >= 1 else _SOFT, font, anchor="ra")
    draw.rectangle((left, bar, right - 1, bar + 5), _TRACK)
    if share:
        draw.rectangle((left, bar, left + share * (_TILE_PX - 1), bar + 5), preset_colour(name))
