"""Pool tokens into one mean per block: what block selection ranks."""
