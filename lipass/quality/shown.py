"""Make small pictures of what was generated, as data URIs, so that results are one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

_WIDEST_PX = 256
_GAP_PX = 2


def tiles(films: Mapping[str, Tensor | None], frames: Sequence[int]) -> str:
    """Lay frames out side by side as WebP: a row a frame, a column a film.

    Args:
        films: videos `[F, 3, H, W]` in 0..1 by name; what is None is left out.
        frames: which to show.

    Returns:
        A data URI; "" without Pillow, which the extra `report` brings.
    """
    shown = [film for film in films.values() if film is not None]
    if not find_spec("PIL") or shown[0].shape[1] != 3:
        return ""
    from PIL import Image

    rows = [torch.cat([_padded(film[at]) for film in shown], 2) for at in frames]
    sheet = torch.cat(rows, 1)[:, :-_GAP_PX, :-_GAP_PX]
    pixels = (sheet * 255 + 0.5).byte().permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _padded(picture: Tensor) -> Tensor:
    """Return a picture `[3, H, W]` of no more than `_WIDEST_PX`, with white behind it."""
    small = picture.detach().cpu().float().clamp(0, 1)
    if small.shape[2] > _WIDEST_PX:
        rows = round(small.shape[1] * _WIDEST_PX / small.shape[2])
        small = F.interpolate(small[None], (rows, _WIDEST_PX), mode="area")[0]
    return F.pad(small, (0, _GAP_PX, 0, _GAP_PX), value=1.0)
