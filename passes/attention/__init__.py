"""Helpers, no passes: what an attention call is, how it is spelled, what its keys are made of."""
