"""minWM (Wan21): the transformer and loop of Self-Forcing, with cameras and a cache for them."""

from __future__ import annotations

from dataclasses import replace

from lipass.adapters import self_forcing

FAMILY = replace(self_forcing.FAMILY, name="minwm")
