"""Rows on disk: JSONL in and out, splits by group, work that goes on where it stopped."""
