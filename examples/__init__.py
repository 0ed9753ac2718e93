"""Runnable examples; each folder is one, reachable from the installed package as `lipass.examples`."""
