"""Helpers, no passes: read and rewrite any FX graph; they know nothing of attention or steps."""
