"""Tasks to Python code."""
