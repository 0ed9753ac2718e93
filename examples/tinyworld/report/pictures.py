"""Turn uint8 frames into pictures: film strips for the page, contact sheets, GIF and mp4."""

import base64
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHEET_FRAMES = 8
GIF_FILMS = ("truth", "off", "all", "reference", "copy-last")
FRAME_MS = 125
_LABEL_PX = 18
_GAP_PX = 4
_PAPER, _INK = (250, 250, 248), (40, 44, 52)
_WEBP_MAX_PX = 16383  # largest side the format allows


def scenes(frames: dict[tuple, np.ndarray]) -> list[tuple]:
    """Return the scenes (trajectory, regime, room) of a set of films, in order."""
    return list(dict.fromkeys(key[1:] for key in frames))


def films_of(
    scene: tuple, frames: dict[tuple, np.ndarray], truth: dict[tuple, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the films of one scene by preset, the truth first."""
    films = {"truth": truth[scene]} if scene in truth else {}
    films.update({key[0]: film for key, film in frames.items() if key[1:] == scene})
    return films


def strip_uri(film: np.ndarray) -> str:
    """Encode `uint8 [F, H, W, 3]` as one tall WebP in a data URI, frames from top to bottom.

    A strip that the page moves behind a window stays in step with everything else on the page; a
    dozen animated images would drift apart and could not be paused.
    """
    count, rows, columns, _ = film.shape
    if count * rows > _WEBP_MAX_PX:
        raise ValueError(
            f"frames times height must be at most {_WEBP_MAX_PX}, got {count} * {rows}; "
            "report fewer chunks"
        )
    buffer = io.BytesIO()
    strip = Image.fromarray(np.ascontiguousarray(film.reshape(count * rows, columns, 3)))
    strip.save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def contact_sheet(films: dict[str, np.ndarray], path: Path) -> Path:
    """Write a PNG with one line of evenly spaced frames for each film."""
    size = _tile_px(films)
    count = min(len(film) for film in films.values())
    shown = np.unique(np.linspace(0, count - 1, SHEET_FRAMES).round().astype(int))
    font = ImageFont.load_default(13)
    margin = 10 + max(int(font.getlength(name)) for name in films)
    sheet = Image.new(
        "RGB",
        (
            margin + len(shown) * (size + _GAP_PX),
            _LABEL_PX + len(films) * (size + _GAP_PX),
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, index in enumerate(shown):
        x = margin + column * (size + _GAP_PX)
        draw.text((x + size / 2, 2), f"frame {index}", _INK, font, anchor="ma")
        for line, (name, film) in enumerate(films.items()):
            y = _LABEL_PX + line * (size + _GAP_PX)
            draw.text((4, y + size / 2), name, _INK, font, anchor="lm")
            sheet.paste(_tile(film[index], size), (x, y))
    sheet.save(path)
    return path


def side_by_side(films: dict[str, np.ndarray], path: Path) -> Path:
    """Write a GIF of the films a reader compares first, with their names above."""
    # 20 times as fast as the default, and these soft pictures show no difference
    pages = [page.quantize(256, Image.Quantize.FASTOCTREE) for page in _beside(films)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=FRAME_MS, loop=0)
    return path


def mp4(films: dict[str, np.ndarray], path: Path) -> Path:
    """Write the same as a film, in full colour; needs PyAV, `pip install 'lipass[video]'`."""
    import av

    with av.open(path, "w") as container:
        stream = None
        for page in _beside(films):
            # Colours are stored for two by two pixels.
            even = page.crop((0, 0, page.width // 2 * 2, page.height // 2 * 2))
            if stream is None:
                stream = container.add_stream("h264", Fraction(1000, FRAME_MS))
                stream.width, stream.height = even.size
                stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        assert stream is not None, "a film has frames"
        container.mux(stream.encode())
    return path


def _beside(films: dict[str, np.ndarray]) -> Iterator[Image.Image]:
    """Yield each frame of the films a reader compares first, beside each other."""
    shown = {name: films[name] for name in GIF_FILMS if name in films} or films
    size = _tile_px(films)
    font = ImageFont.load_default(13)
    for index in range(min(len(film) for film in shown.values())):
        canvas = Image.new(
            "RGB", (len(shown) * (size + _GAP_PX) - _GAP_PX, size + _LABEL_PX), _PAPER
        )
        draw = ImageDraw.Draw(canvas)
        for column, (name, film) in enumerate(shown.items()):
            x = column * (size + _GAP_PX)
            draw.text((x + size / 2, 1), name, _INK, font, anchor="ma")
            canvas.paste(_tile(film[index], size), (x, _LABEL_PX))
        yield canvas


def _tile_px(films: dict[str, np.ndarray]) -> int:
    rows = next(iter(films.values())).shape[1]
    return max(128, rows)


def _tile(frame: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
