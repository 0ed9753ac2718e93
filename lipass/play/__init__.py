"""Serve a world to browsers: walked in while it is made, dense and accelerated.

`world.py` says what a world is; nothing here knows a model. `lipass play` is the command.
"""
