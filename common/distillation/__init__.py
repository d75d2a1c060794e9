"""Training on the distributions of a teacher, live, cached, or of labels."""
