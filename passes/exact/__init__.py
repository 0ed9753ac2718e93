"""Passes that keep the result, to the bit or to rounding."""
