"""What both servers share: request ids, limits, keys, errors, metrics."""
