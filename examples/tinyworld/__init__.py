"""TinyWorld: a small, real, interactive world model, trained here, in place of a user's own."""
