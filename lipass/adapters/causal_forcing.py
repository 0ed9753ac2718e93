"""Causal-Forcing: the transformer and loop of Self-Forcing, with levels for the first block."""

from __future__ import annotations

from dataclasses import replace

from lipass.adapters import self_forcing

FAMILY = replace(self_forcing.FAMILY, name="causal_forcing")
