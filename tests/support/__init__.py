"""What several test files share: places, small inputs, tiny models, processes, servers."""
