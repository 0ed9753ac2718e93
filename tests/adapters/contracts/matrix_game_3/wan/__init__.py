"""The call structure of Matrix-Game-3.0 in small, in this project's own words."""
