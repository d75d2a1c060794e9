"""Trainers: rows to batches, losses, checkpoints, the life of a run."""
