"""Count what a chunk of a real model costs under each preset, along the paper's walks."""
