"""A teacher writes training data: answers, reasons, preference pairs, label probabilities."""
