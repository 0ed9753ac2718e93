"""Do for eager code what passes do for graphs."""
