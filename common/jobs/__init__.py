"""Trainings as jobs behind HTTP, on this machine or on Kubernetes."""
