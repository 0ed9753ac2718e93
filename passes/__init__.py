"""Graph passes: FX graphs in, FX graphs out."""
