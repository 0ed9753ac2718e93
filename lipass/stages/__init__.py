"""Denoising and decoding as stages, one after the other or side by side."""

from __future__ import annotations

from lipass.stages.front import Stages
from lipass.stages.line import StageError
from lipass.stages.now import Stale, is_stale
from lipass.stages.stage import Stage

__all__ = ["Stage", "StageError", "Stages", "Stale", "is_stale"]
