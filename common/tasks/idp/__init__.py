"""Documents to JSON."""
