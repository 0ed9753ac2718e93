"""Let models be compiled as they are: bring to graphs what they hide from them."""
