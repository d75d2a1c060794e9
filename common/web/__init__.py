"""What both servers share: ids, limits, keys, errors, metrics."""
