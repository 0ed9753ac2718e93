"""Say the result of a demo in one sentence, and what it was measured on."""

from html import escape

from .columns import decibel, scene_of, scene_title

BASE, HEADLINE = "off", "all"


def header(result: dict) -> str:
    """Return the head of the page: the sentence, then device and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f'<header><p class="brand">lipass demo</p><h1 id="result">{_sentence(result["rows"])}</h1>'
        f'<p class="where">{escape(_where(result["rows"]))} {escape(str(result["device"]))}, '
        f"{escape(versions)}.</p></header>"
    )


def _sentence(rows: list[dict]) -> str:
    own = [row for row in rows if row["preset"] == HEADLINE]
    speed = mean(own, "speedup_vs_off")
    if speed is None:
        return "A trained world model, rolled out under several presets."
    told = f"<b>all</b> makes these frames {speed:.2f}x as fast as <i>off</i>"
    lost = _change(rows, own)
    if lost is not None:
        told += f", {abs(lost):.1f} dB {'closer to' if lost > 0 else 'further from'} the truth"
        if abs(lost) < 0.05:
            told = told.rpartition(",")[0] + ", and as close to the truth"
    return told + "."


def _change(rows: list[dict], own: list[dict]) -> float | None:
    """Return how much closer to the renderer the headline preset comes than the base, in dB."""
    dense = {scene_of(row): row.get("psnr_vs_truth_db") for row in rows if row["preset"] == BASE}
    changes = [
        row["psnr_vs_truth_db"] - dense[scene_of(row)]
        for row in own
        if row.get("psnr_vs_truth_db") is not None and dense.get(scene_of(row)) is not None
    ]
    return sum(changes) / len(changes) if changes else None


def _where(rows: list[dict]) -> str:
    own = [row for row in rows if row["preset"] == HEADLINE]
    told = []
    scenes = {scene_of(row) for row in own}
    if len(scenes) > 1:
        told.append(f"Means over {len(scenes)} scenes.")
    elif scenes:
        told.append(f"{scene_title(scenes.pop()).capitalize()}.")
    distance = mean(own, "psnr_vs_off_db")
    if distance:
        told.append(f"{decibel(distance, ' dB')} from the pictures of off.")
    counts = [row.get("recompiles_after_warmup") for row in rows]
    recompiles = [count for count in counts if count is not None]
    if recompiles:
        told.append(f"{sum(recompiles) or 'No'} recompilations after warm-up.")
    return " ".join(told)


def mean(rows: list[dict], key: str) -> float | None:
    """Average one figure over the rows that have it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None
