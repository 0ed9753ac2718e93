"""Passes that find out what a graph holds (attention, cameras, steps) and change no value."""
