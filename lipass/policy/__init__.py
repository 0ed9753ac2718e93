"""Policies: which context, steps and blocks a chunk uses; plain Python, no torch.compile."""
