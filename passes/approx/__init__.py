"""Passes that change the result for speed; a preset or an option asks for each by name."""
