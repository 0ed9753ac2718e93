"""What only a GPU can answer, in parts that fit nine minutes; `make gpu-day` runs them all."""
