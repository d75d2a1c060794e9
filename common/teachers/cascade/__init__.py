"""Rows that a student is not sure of go to a teacher, within a budget; its answers can become training rows."""
