"""Trainings as jobs behind HTTP."""
