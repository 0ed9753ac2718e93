"""Quality in dB: same-index frames, raw tensors, errors averaged before the logarithm."""

from torch import Tensor

from lipass.quality import affected, psnr_db, returns

_EQUAL_DB = 100.0

__all__ = ["affected_psnr_db", "psnr_db", "self_consistency_db"]


def affected_psnr_db(x: Tensor, y: Tensor, chunk: int) -> float:
    """PSNR over those chunks of frames `[F, C, H, W]` that differ at all; 100 where none does."""
    differs = affected(x, y, chunk)
    return psnr_db(x[differs], y[differs]) if differs.any() else _EQUAL_DB


def self_consistency_db(frames: Tensor, w2c: Tensor, first_generated: int) -> float | None:
    """PSNR between a place and its revisit within one video; None where nothing is revisited."""
    pairs = returns(w2c, first_generated)
    if not pairs:
        return None
    first, again = zip(*pairs, strict=True)
    return psnr_db(frames[list(first)], frames[list(again)])
