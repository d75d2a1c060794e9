"""Shared code of the distill-slm scripts: small modules, one subject each, no sub-packages."""
