"""Shared code of the distill-slm scripts, in rooms with layers: see common/README.md."""
