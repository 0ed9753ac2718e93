"""Select the key blocks that each query block visits."""
