"""Say in one word what became of a video: the only place that has these thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Verdict(Enum):
    """What somebody would say who sees a video beside that of the dense model, best first."""

    UNCHANGED = "unchanged"
    SAME_SCENE = "same scene"
    CHANGED = "changed"
    BROKEN = "broken"

    @property
    def rank(self) -> int:
        """0 for the best."""
        return list(Verdict).index(self)


# 40 dB is a mean error of 2.6 of 255 levels, which nobody sees in a film.
UNCHANGED_DB, UNCHANGED_SSIM = 40.0, 0.98
# At 30 dB, 8 levels, edges and colours stay where they are and details differ.
SAME_DB, SAME_SSIM = 30.0, 0.90
# Further from the truth than the dense model by this, or this much of the loop score lost.
BROKEN_LOSS_DB, BROKEN_LOOP = 3.0, 0.2
# Without a truth: at 15 dB two pictures of one room have little in common.
BROKEN_DB = 15.0

MEANINGS = {
    Verdict.UNCHANGED: f"its worst chunk has {UNCHANGED_DB:.0f} dB or more to the dense model, "
    f"and an SSIM of {UNCHANGED_SSIM} or more",
    Verdict.SAME_SCENE: f"its worst chunk has {SAME_DB:.0f} dB or more, and an SSIM of "
    f"{SAME_SSIM} or more",
    Verdict.CHANGED: "pictures differ, and are no worse",
    Verdict.BROKEN: f"more than {BROKEN_LOSS_DB:.0f} dB further from the truth than the dense "
    f"model, more than {BROKEN_LOOP} less of a loop score, values that are no numbers or far "
    f"from 0..1, or, where no truth is known, a worst chunk below {BROKEN_DB:.0f} dB",
}


def verdict(
    worst_db: float | None,
    worst_ssim: float | None,
    *,
    truth_loss_db: float | None = None,
    loop_loss: float | None = None,
) -> Verdict:
    """Name what became of a video.

    Args:
        worst_db: PSNR of the worst chunk to the dense model; None where they cannot be compared.
        worst_ssim: SSIM of the worst chunk.
        truth_loss_db: how much further from the truth than the dense model the video is.
        loop_loss: how much less its loop score is.
    """
    if worst_db is None or worst_ssim is None:
        return Verdict.BROKEN
    if worst_db >= UNCHANGED_DB and worst_ssim >= UNCHANGED_SSIM:
        return Verdict.UNCHANGED
    if (truth_loss_db or 0.0) > BROKEN_LOSS_DB or (loop_loss or 0.0) > BROKEN_LOOP:
        return Verdict.BROKEN
    if worst_db >= SAME_DB and worst_ssim >= SAME_SSIM:
        return Verdict.SAME_SCENE
    if truth_loss_db is None and worst_db < BROKEN_DB:
        return Verdict.BROKEN
    return Verdict.CHANGED


def of(values: Mapping[str, float | None], dense: Mapping[str, float | None]) -> Verdict:
    """Name what became of a rollout, from the figures of `measure` of it and of the dense one."""
    losses = [
        None if values.get(key) is None or dense.get(key) is None else dense[key] - values[key]  # type: ignore[operator]
        for key in ("psnr_vs_truth_db", "loop_score")
    ]
    return verdict(
        values.get("psnr_vs_off_worst_db"),
        values.get("ssim_vs_off_worst"),
        truth_loss_db=losses[0],
        loop_loss=losses[1],
    )
