"""Say what an approximation costs: figures of pictures, of walks and of time, for any video model.

Functions take raw tensors, so a model of one's own needs nothing but what it generated. `measure`
gives all figures that what is known allows, `evaluate` rolls out methods through scenes, which is
what `lipass eval` does. Nothing is estimated by a network: no weights, no downloads.
"""

from lipass.quality.figures import METRICS, Metric, Rollout, Scene, measure
from lipass.quality.geometry import Consistency, Space, consistency, followed
from lipass.quality.intervals import bootstrap
from lipass.quality.pictures import (
    affected,
    latent_error,
    psnr_db,
    psnr_each_db,
    ssim,
    ssim_each,
)
from lipass.quality.verdicts import Verdict, verdict
from lipass.quality.videos import Drift, Seams, drift, loop_score, returns, seams

__all__ = [
    "METRICS",
    "Consistency",
    "Drift",
    "Metric",
    "Rollout",
    "Scene",
    "Seams",
    "Space",
    "Verdict",
    "affected",
    "bootstrap",
    "consistency",
    "drift",
    "followed",
    "latent_error",
    "loop_score",
    "measure",
    "psnr_db",
    "psnr_each_db",
    "returns",
    "seams",
    "ssim",
    "ssim_each",
    "verdict",
]
