"""Find which options are worth what on a model, and let sessions choose among them by time."""
