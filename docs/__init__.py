"""The pages, and what writes those that are read off the code."""
