"""Print the rows of a demo on a terminal of 80 columns."""

from .columns import COLUMNS, by_scene, cell, scene_title

WIDTH = 80
_SHOWN = (
    "dit_core_s",
    "speedup_vs_off",
    "psnr_vs_off_db",
    "psnr_vs_off_affected_db",
    "psnr_vs_truth_db",
    "self_consistency_db",
    "density",
    "context_latents_mean",
    "kv_bytes_peak",
    "recompiles_after_warmup",
)
_LEGEND = (
    "core s: prefill + denoising. PSNR in dB: ~off against the dense output, ~aff the",
    "same where chunks differ, ~truth against the renderer, revis against own views.",
)


def table(result: dict) -> str:
    """Return the table of all rows: one block a scene, one line a preset."""
    shown = [column for column in COLUMNS if column.key in _SHOWN]
    head = ["preset", *(column.short for column in shown), "steps"]
    lines = []
    for scene, rows in by_scene(result["rows"]).items():
        body = [
            [row["preset"], *(cell(column, row) for column in shown), _steps(row)] for row in rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines += [scene_title(scene), _line(head, widths), "-" * len(_line(head, widths))]
        lines += [_line(line, widths) for line in body]
        lines.append("")
    return "\n".join([*lines, *_LEGEND])


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = (
        text.ljust(width) if i == 0 else text.rjust(width)
        for i, (text, width) in enumerate(zip(cells, widths, strict=True))
    )
    return " ".join([first, *rest])


def _steps(row: dict) -> str:
    if row.get("steps_total") is None:
        return "-"
    return f"{row['steps_computed']:.0f}/{row['steps_total']:.0f}"
