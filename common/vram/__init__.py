"""What a command will take of the memory, before it loads anything."""
