"""Runnable examples: each folder is one, installed under `lipass.examples`."""
