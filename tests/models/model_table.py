"""What becomes of the attention of each model that is tried; tests hold it, the docs show it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rare_zoo import RARE
from video_zoo import VIDEO

MODELS: dict[str, Callable[[], Any]] = {**VIDEO, **RARE}

_CLIP, _IMAGE = {"sparse.token_grid": (3, 4, 6)}, {"sparse.token_grid": (1, 4, 6)}


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        rewritten: attention calls over latents that become sparse, of all there are.
        options: what it needs to be told.
        adopt: whether `lipass.adopt` comes first.
        reason: part of what the receipt says of latents that stay.
        why: the same for readers.
        slow: whether it compiles for long.
    """

    rewritten: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    adopt: bool = False
    reason: str = ""
    why: str = ""
    slow: bool = False


ROWS: dict[str, Row] = {
    "wan": Row(),
    "wan-i2v": Row(),
    "wan-ti2v": Row(),
    "wan-vace": Row(4),
    "wan-animate": Row(slow=True),
    "chrono-edit": Row(),
    "skyreels-v2": Row(),
    "skyreels-v2-df": Row(),
    "anyflow": Row(),
    "anyflow-far": Row(
        0,
        reason="masks its scores",
        why="FlexAttention with a mask over chunks",
        slow=True,
    ),
    "anyflow-far-step": Row(
        options={"find-attention.segments": ("text", "history", "current", "text")},
        slow=True,
    ),
    "helios": Row(),
    "helios-amplified": Row(slow=True),
    "cosmos": Row(),
    "kandinsky-5": Row(),
    "kandinsky-6": Row(slow=True),
    "kandinsky-6-sr": Row(
        0,
        reason="its blocks are data",
        why="it chooses blocks itself, from its own scores",
        slow=True,
    ),
    "sana-wm": Row(4, slow=True),
    "sana-wm-refiner": Row(options=_CLIP),
    "sana-video": Row(0, why="its self-attention is linear, there are no scores to leave out"),
    "ltx": Row(),
    "ltx-2": Row(slow=True),
    "allegro": Row(),
    "latte": Row(),
    "cogvideox": Row(),
    "consis-id": Row(),
    "easy-animate": Row(),
    "hunyuan-video": Row(),
    # Dynamo compiles its block alone, once for both layers, so that they share one receipt.
    "hunyuan-video-1.5": Row(2, options=_CLIP, slow=True),
    "hunyuan-framepack": Row(
        0,
        reason="no reshape from [.., T, Y, X, ..] to its tokens is upstream of q",
        why="`.item()` cuts its graph into blocks that see coarse history and latents as one run",
        slow=True,
    ),
    "joy-image-edit": Row(),
    "minimax-h3": Row(
        0,
        reason="no reshape from [.., T, Y, X, ..] to its tokens is upstream of q",
        why="latents, words and sound are scattered into one run by index tensors, which are data",
        slow=True,
    ),
    "mochi": Row(adopt=True, slow=True),
    "motif-video": Row(),
    "flux": Row(options=_IMAGE),
    "sd3": Row(),
    "qwen-image": Row(options=_IMAGE),
    "pixart": Row(),
}

PAGE = Path(__file__).parents[2] / "docs" / "models" / "diffusers.md"
_TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end -->)", re.DOTALL)


def table() -> str:
    """Print the rows as a table of Markdown, as the page shows them."""
    lines = [
        "| configuration | rewritten | what it needs, or why its latents stay |",
        "|---|---|---|",
    ]
    for name, row in ROWS.items():
        needs = [f"`{key}={value}`" for key, value in row.options.items()]
        needs += ["`lipass.adopt(model)` first"] if row.adopt else []
        lines.append(f"| {name} | {row.rewritten or 'no'} | {', '.join(needs) or row.why} |")
    return "\n".join(lines) + "\n"


def shown() -> str:
    """Return the table that the page has."""
    found = _TABLE.search(PAGE.read_text())
    assert found is not None
    return found[0]


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _: table(), PAGE.read_text()))
