"""Merge keys of a history that correspond across latents: newest key, mean value, count."""
