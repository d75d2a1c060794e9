"""Teacher against student: quality, speed, memory."""
