"""Attend over the key blocks that a plan names."""
