"""The three tasks, each with its prompt, rows, metrics and report."""
