"""A teacher writes training data."""
