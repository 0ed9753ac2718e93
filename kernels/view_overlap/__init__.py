"""View overlap: the share of one camera's view that another camera shows."""
