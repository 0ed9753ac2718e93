"""Measurements: each module is a command that writes what it found."""
