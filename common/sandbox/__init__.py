"""A box for generated code, and a judge in a box of its own."""
