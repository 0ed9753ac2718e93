"""Sort queries and keys into buckets of like direction, and visit blocks by their buckets."""
