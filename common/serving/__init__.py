"""The inference server: a process for each base, every adapter on it."""
