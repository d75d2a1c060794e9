"""Training on a teacher's distributions: live, from a cache, or over labels."""
