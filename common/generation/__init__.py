"""Text from a model, and JSON that is valid by construction."""
